"""Every family of Hugging Face classifiers, small and with random weights, through every export.

``python -m trainkit.bench.families`` writes ``bench/results/families.json``: families x formats x
precisions with the largest difference from Hugging Face's own forward and the label agreement.
Random weights of this size are harsher on a lower precision than trained ones are.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from trainkit.bench.environment import Environment, describe
from trainkit.data.readers import Example
from trainkit.data.splits import load_sample
from trainkit.data.vocabulary import PAD_ID, word_tokenizer
from trainkit.export import parity
from trainkit.export.export import Prepared, prepare
from trainkit.export.model_file import Settings, write_model
from trainkit.export.onnx_graph import OPSET
from trainkit.export.source import Source, from_hub
from trainkit.models import hub_classifier
from trainkit.serve.encoding import TextEncoder
from trainkit.serve.errors import CheckFailedError
from trainkit.serve.files import pretty_json, write_atomically

__all__ = [
    "FAMILIES",
    "SIZES",
    "Families",
    "load",
    "markdown",
    "random_classifier",
    "random_source",
]

RESULTS = Path("bench/results/families.json")
MAX_LENGTH = 40
TEXTS = 350  # the rest of the 750 are the data for int8

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 66,
}
_DECODER = {"num_key_value_heads": 2, "use_cache": False}
# By transformers' `model_type`; what each needs beside SIZES to be itself.
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "camembert": {},
    "electra": {"embedding_size": 24},
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48},
    "albert": {"embedding_size": 16},
    "mpnet": {},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "type_vocab_size": 0,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_buckets": 8,
    },
    "modernbert": {"global_attn_every_n_layers": 3, "local_attention": 8},
    "mobilebert": {
        "embedding_size": 16,
        "intra_bottleneck_size": 32,
        "true_hidden_size": 32,
        "num_feedforward_networks": 2,
    },
    "fnet": {},
    "qwen2": _DECODER,
    "llama": _DECODER,
    "gemma3_text": {
        **_DECODER,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
}


def random_classifier(family: str, vocabulary: int, **settings: Any) -> PreTrainedModel:
    """Build a small classifier with large random weights: small ones would hide faults."""
    torch.manual_seed(0)
    ids = {f"{name}_token_id": i for i, name in enumerate(("cls", "sep", "bos", "eos"), start=1)}
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": vocabulary,
            "pad_token_id": PAD_ID,
            "num_labels": 3,
            **ids,
            **SIZES,
            **FAMILIES[family],
            **settings,
        },
    )
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config).eval()
    # About 1 / sqrt(fan-in): more, and attention saturates until rounding alone decides.
    std = 1.13 / config.hidden_size**0.5
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=std)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            torch.nn.init.zeros_(module.weight[module.padding_idx])  # as training leaves it
    return model


def random_source(family: str, **settings: Any) -> Source:
    """Return the source of a random classifier with a tokenizer of the sample's words."""
    tokenizer = word_tokenizer([example.text for example in load_sample()], min_count=4)
    model = random_classifier(family, tokenizer.get_vocab_size(), **settings)
    encoder = TextEncoder(
        tokenizer, MAX_LENGTH, PAD_ID, token_types=hub_classifier.takes_token_types(model)
    )
    loaded = hub_classifier.pack(model, encoder)
    return from_hub(loaded, {"kind": "classifier", "backbone": family})


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One export: how far it is from Hugging Face on the whole matrix, or why it was refused."""

    family: str
    format: str
    precision: str
    opset: int | None
    layout: str
    cases: int
    max_abs: float | None
    max_rel: float | None
    label_agreement: float | None
    refused: str = ""


class Families(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of ``families.json``."""

    command: list[str]
    environment: Environment
    rows: tuple[Row, ...]


EXPORTS = (
    Settings(),
    Settings(opset=18),
    Settings(precision="fp16"),
    # The gate is open: random weights put many rows near a tie. The matrix judges all the same.
    Settings(precision="int8", max_accuracy_drop=100, min_label_agreement=0),
    Settings(format="torchscript"),
    Settings(format="pt2"),
)


def measure(prepared: Prepared, family: str, settings: Settings) -> Row:
    """Export in a scratch folder; a refusal is a row too."""
    source = prepared.source
    report: parity.Report | None = None
    refused = ""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            written = write_model(
                source, prepared.cases, prepared.gate, settings, Path(scratch), lambda step: None
            )
            report = [stage.parity for stage in written.stages if stage.parity is not None][-1]
        except parity.ParityError as error:
            report, refused = error.report, str(error)
        except CheckFailedError as error:
            refused = str(error)
    return Row(
        family=family,
        format=settings.format,
        precision=settings.precision,
        opset=settings.opset if settings.format == "onnx" else None,
        layout="padded" if source.facts["padded_because"] else "packed",
        cases=report.cases if report else 0,
        max_abs=report.max_abs if report else None,
        max_rel=report.max_rel if report else None,
        label_agreement=report.label_agreement if report else None,
        refused=refused,
    )


def main() -> None:
    """Measure every family, and write the results."""
    rows = []
    for family in FAMILIES:
        prepared = _prepared(family)
        for settings in EXPORTS:
            rows.append(measure(prepared, family, settings))
            print(rows[-1], file=sys.stderr, flush=True)
    document = Families(
        command=["python", "-m", "trainkit.bench.families"],
        environment=describe(),
        rows=tuple(rows),
    )
    write_atomically(RESULTS, pretty_json(document))


def _prepared(family: str) -> Prepared:
    """Prepare with the sample's questions as data, labelled as the model itself labels them.

    Random weights have no accuracy to lose; what is judged is whether the labels stay.
    """
    source = random_source(family)
    texts = [example.text for example in load_sample()[TEXTS:]]
    answers = source.classifier()(texts)
    data = [Example(text, answer.label) for text, answer in zip(texts, answers, strict=True)]
    return prepare(source, data)


def load(path: Path = RESULTS) -> Families:
    """Read ``families.json``."""
    return msgspec.json.decode(path.read_bytes(), type=Families)


def markdown(families: Families) -> str:
    """Lay the rows out: a family a line, an export a column."""
    columns = list(dict.fromkeys(_column(row) for row in families.rows))
    cells = {(row.family, _column(row)): _cell(row) for row in families.rows}
    layouts = {row.family: row.layout for row in families.rows}
    lines = [
        f"| family | layout | {' | '.join(columns)} |",
        f"|---|---|{'---|' * len(columns)}",
    ]
    for family, layout in layouts.items():
        row = " | ".join(cells[family, column] for column in columns)
        lines.append(f"| {family} | {layout} | {row} |")
    return "\n".join(lines)


def _column(row: Row) -> str:
    opset = f" {row.opset}" if row.opset not in (None, OPSET) else ""
    precision = f" {row.precision}" if row.precision != "fp32" else ""
    return f"{row.format}{opset}{precision}"


def _cell(row: Row) -> str:
    if row.max_rel is None or row.label_agreement is None:
        return "refused"
    numbers = f"{row.max_rel:.0e}, {100 * row.label_agreement:.4g} %"
    return f"refused ({numbers})" if row.refused else numbers


if __name__ == "__main__":
    main()

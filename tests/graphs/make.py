"""Trace the small graphs on which the rewrites are tested: ``python tests/graphs/make.py``.

Each is a classifier of a real family with three tiny layers and random weights, as an exporter
leaves it before any rewrite. A trace takes 5 to 15 seconds, reading the file takes milliseconds.
Weights have four values only, so that a compressed file has 10 to 20 kB.
"""

import io
import lzma
import sys
from pathlib import Path
from typing import NamedTuple

import onnx
import onnx_ir as ir
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # as a script: the repository, for tests

from tests.families import FAMILIES, SIZES  # noqa: E402
from trainkit.export.onnx_graph import export_graph  # noqa: E402
from trainkit.export.quiet import quiet_exporter  # noqa: E402
from trainkit.export.rewrite.strip import strip_metadata  # noqa: E402
from trainkit.models.attention import KeyValuePrefix  # noqa: E402
from trainkit.models.packing import pack_encoder  # noqa: E402

COMMON = {"vocab_size": 200, "num_labels": 3, "pad_token_id": 0, **SIZES}
SPECIAL = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
PREFIX_LENGTH = 5


class Graph(NamedTuple):
    """What a graph is made of. Layouts: ``packed`` and ``prefix`` as trainkit exports them,
    ``padded`` as any other program does, and ``legacy`` by the exporter before torch 2.9.
    """

    family: str
    layout: str
    opset: int
    attention: str = "sdpa"

    @property
    def path(self) -> Path:
        """The committed file."""
        return HERE / f"{self}.onnx.xz"

    def __str__(self) -> str:
        return f"{self.family}-{self.layout}-{self.attention}-{self.opset}"


GRAPHS = (
    Graph("albert", "legacy", 17),
    Graph("albert", "padded", 23),
    Graph("bert", "legacy", 14),
    Graph("bert", "legacy", 17, "eager"),
    Graph("bert", "packed", 18),
    Graph("bert", "packed", 23),
    Graph("bert", "padded", 18),
    Graph("bert", "padded", 23),
    Graph("bert", "prefix", 18),
    Graph("bert", "prefix", 23),
    Graph("camembert", "packed", 23),
    Graph("deberta-v2", "legacy", 17, "eager"),
    Graph("distilbert", "legacy", 14),
    Graph("distilbert", "legacy", 17, "eager"),
    Graph("distilbert", "packed", 18),
    Graph("distilbert", "packed", 23),
    Graph("electra", "legacy", 17),
    Graph("electra", "packed", 23),
    Graph("gemma3_text", "legacy", 17),
    Graph("llama", "legacy", 17),
    Graph("mobilebert", "legacy", 17),
    Graph("mobilebert", "packed", 23),
    Graph("modernbert", "legacy", 17),
    Graph("modernbert", "padded", 23),
    Graph("mpnet", "legacy", 17, "eager"),
    Graph("qwen2", "legacy", 17),
    Graph("qwen2", "padded", 23),
    Graph("roberta", "legacy", 17),
    Graph("roberta", "packed", 23),
    Graph("xlm-roberta", "packed", 23),
)


class Logits(torch.nn.Module):
    """A Hugging Face classifier that returns its logits only."""

    def __init__(self, model: torch.nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **types).logits


def trace(wanted: Graph) -> ir.Model:
    """Build the classifier and trace it, without the exporter's metadata."""
    model = _build(wanted)
    if wanted.layout == "legacy":
        graph = _legacy(model, wanted.opset)
    else:
        with torch.no_grad():
            graph = export_graph(model, _example(model.names), model.names, wanted.opset)
    strip_metadata(graph)
    return graph


def read(wanted: Graph) -> ir.Model:
    """Read the committed graph."""
    return ir.from_proto(onnx.load_from_string(lzma.decompress(wanted.path.read_bytes())))


def _build(wanted: Graph) -> Logits:
    """Make a random classifier; its weights are wide: a wrong rewrite changes the logits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            wanted.family, **{**COMMON, **SPECIAL, **FAMILIES[wanted.family]}
        )
        if hasattr(config, "use_cache"):
            config.use_cache = False
        model = AutoModelForSequenceClassification.from_config(
            config, attn_implementation=wanted.attention
        ).eval()
        # Standard deviations of 0.2 and 0.1.
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                _draw(weight, 0.09)
            elif "bias" in name:
                _draw(weight, 0.045)
        if wanted.layout in ("packed", "prefix"):
            packing = pack_encoder(model.base_model)
            assert not packing.declined
            for site in packing.sites if wanted.layout == "prefix" else ():
                prefix = KeyValuePrefix(site.heads, PREFIX_LENGTH, site.head_size)
                for weight in prefix.parameters():
                    _draw(weight, 0.5)
                site.module.prefix = prefix
    names = ["input_ids", "attention_mask"]
    if (getattr(config, "type_vocab_size", 0) or 0) > 1:
        names.append("token_type_ids")
    return Logits(model, names)


def _draw(weight: torch.Tensor, unit: float) -> None:
    """Fill ``weight`` with -3, -1, 1 and 3 times ``unit``."""
    with torch.no_grad():
        weight.copy_(unit * (2 * torch.randint(0, 4, weight.shape) - 3))


def _example(names: list[str]) -> tuple[torch.Tensor, ...]:
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, 5:] = mask[2, 7:] = 0
    ids = torch.arange(27).reshape(3, 9) + 3
    return tuple({"input_ids": ids, "attention_mask": mask}.get(n, 0 * ids) for n in names)


def _legacy(model: Logits, opset: int) -> ir.Model:
    """Export as programs did before torch 2.9, and as optimum still does."""
    axes = {0: "batch_size", 1: "sequence_length"}
    file = io.BytesIO()
    with quiet_exporter(), torch.no_grad():
        torch.onnx.export(
            model,
            _example(model.names),
            file,
            dynamo=False,
            opset_version=opset,
            input_names=model.names,
            output_names=["logits"],
            dynamic_axes={**dict.fromkeys(model.names, axes), "logits": {0: "batch_size"}},
        )
    return ir.from_proto(onnx.load_from_string(file.getvalue()))


def main() -> None:
    """Write every graph, and remove files of graphs that are no longer in the list."""
    for path in set(HERE.glob("*.onnx.xz")) - {graph.path for graph in GRAPHS}:
        path.unlink()
    for graph in GRAPHS:
        content = ir.to_proto(trace(graph)).SerializeToString()
        graph.path.write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
        print(f"{graph}: {graph.path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

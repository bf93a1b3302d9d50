"""The full table: one Hugging Face classifier in every runtime and peer, on real texts.

``python -m trainkit.bench.studies suite --model minilm --data data/trec`` fine-tunes MiniLM for one
epoch, exports it in every format, and races whatever there is; ``make peers`` adds the peers.
``base`` is that model grown to BERT-base's size and trained for one epoch more; with ``--reuse`` it
runs on other data too, whose labels it does not know. Writes
``bench/results/suite-MODEL-DATA.json``.
"""

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    PreTrainedModel,
    get_linear_schedule_with_warmup,
)

from trainkit.bench.engines.registry import Spec, applicable
from trainkit.bench.race import runner
from trainkit.bench.report.tables import table
from trainkit.bench.result import BenchmarkSettings, check, save
from trainkit.bench.studies.quiet_machine import wait_until_quiet
from trainkit.bench.studies.widened_bert import grow
from trainkit.cli_errors import ErrorReportingCommand
from trainkit.console import stderr, stdout, steps
from trainkit.data.columns import Columns
from trainkit.data.readers import Example
from trainkit.data.splits import Splits, load
from trainkit.export.bundle_writer import prepare, write_bundle
from trainkit.export.settings import ExportSettings
from trainkit.export.source import open_source
from trainkit.models.backbone import resolve
from trainkit.models.loading import quiet
from trainkit.serve.bundle import MANIFEST
from trainkit.serve.cores import usable_cores
from trainkit.serve.errors import CheckFailedError

__all__ = ["main"]

RESULTS = Path("bench/results")
# That judge int8, with training texts where validation has fewer: of 91 posts a single one is more
# than the half point that may be lost.
GATE_TEXTS = 400
MAX_LENGTH = 512
BATCH = 32
LEARNING_RATES = {"minilm": 1e-4, "base": 5e-5}
EXPORTS = (
    ExportSettings(),
    ExportSettings(precision="int8"),
    ExportSettings(format="torchscript"),
    ExportSettings(format="pt2"),
    ExportSettings(format="aoti"),
)


@click.command(cls=ErrorReportingCommand)
@click.option("--model", type=click.Choice(["minilm", "base"]), default="minilm")
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--text-column")
@click.option("--label-column")
@click.option("--texts", default=200, show_default=True, help="Of the test set, from its start.")
@click.option("--batch-size", "batch_sizes", multiple=True, type=int, default=[1, 32])
@click.option("--min-rounds", default=10, show_default=True)
@click.option("--reuse", is_flag=True, help="Race the exports that the last run left.")
@click.option("--calm-minutes", default=0.0, help="To wait for a calm machine.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/suite"))
def main(
    model: str,
    data: Path,
    text_column: str | None,
    label_column: str | None,
    texts: int,
    batch_sizes: tuple[int, ...],
    min_rounds: int,
    reuse: bool,
    calm_minutes: float,
    work: Path,
) -> None:
    """Measure one model on one data set in every runtime."""
    splits = load(data, Columns(text_column=text_column, label_column=label_column))
    name = f"{model}-{data.name}"
    made = work / ("base" if model == "base" else name)  # base is one model for all data
    folder = made / "classifier"
    if not reuse:
        shutil.rmtree(made, ignore_errors=True)  # this program's own, from its last time
        _make(model, splits, folder)
        _export(folder, splits)
    bundles = sorted(path.parent for path in made.glob(f"*/{MANIFEST}"))
    # Hugging Face's own forward is the baseline: what everybody begins with.
    names = ["huggingface", *(one for one in applicable(folder) if one != "huggingface")]
    specs = [Spec(runtime, folder) for runtime in names]
    specs += [Spec(runtime, bundle) for bundle in bundles for runtime in applicable(bundle)]
    settings = BenchmarkSettings(
        batch_sizes=batch_sizes,
        threads=(usable_cores(),),
        min_seconds=5.0,
        min_rounds=min_rounds,
    )
    command = ["python", "-m", "trainkit.bench.studies.suite", *sys.argv[1:]]
    with steps() as told:
        wait_until_quiet(60 * calm_minutes, told)
        result = runner.run(
            specs, splits.test[:texts], settings, data=data.name, on_progress=told, command=command
        )
    save(result, RESULTS / f"suite-{name}.json")
    stdout.print(table(result))
    check(result)


def _make(kind: str, splits: Splits, folder: Path) -> None:
    """Save a classifier as transformers does; MiniLM's has the data's labels."""
    tokenizer = AutoTokenizer.from_pretrained(resolve("minilm"))
    torch.manual_seed(0)
    with quiet():
        model = _minilm(sorted({example.label for example in splits.train}))
        _finetune(model, tokenizer, splits.train, LEARNING_RATES["minilm"])
        if kind == "base":
            model = grow(model)
            _finetune(model, tokenizer, splits.train, LEARNING_RATES["base"])
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _minilm(labels: Sequence[str]) -> BertForSequenceClassification:
    model: BertForSequenceClassification = BertForSequenceClassification.from_pretrained(
        resolve("minilm"),
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    return model


def _finetune(
    model: PreTrainedModel, tokenizer: Any, examples: Sequence[Example], learning_rate: float
) -> None:
    """Train for one epoch, texts of like length together: accuracy beside speed, no record."""
    batches = list(_batches(examples))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = get_linear_schedule_with_warmup(optimizer, len(batches) // 10, len(batches))
    number = model.config.label2id or {}
    model.train()
    for done, batch in enumerate(batches, start=1):
        inputs = tokenizer(
            [example.text for example in batch],
            padding=True,
            truncation=True,
            max_length=MAX_LENGTH,
            return_tensors="pt",
        )
        loss = model(**inputs, labels=torch.tensor([number[one.label] for one in batch])).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if done % 20 == 0:
            stderr.print(f"fine-tuning: batch {done} of {len(batches)}, loss {loss.item():.2f}")
    model.eval()


def _batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    by_length = sorted(examples, key=lambda example: len(example.text))
    starts = torch.arange(0, len(by_length), BATCH)
    for start in starts[torch.randperm(len(starts))].tolist():
        yield by_length[start : start + BATCH]


def _export(folder: Path, splits: Splits) -> None:
    """Export in every format; a precision that the gate refuses is left out, and said."""
    source = open_source(str(folder))
    prepared = prepare(source, (*splits.valid, *splits.train)[:GATE_TEXTS])
    for settings in EXPORTS:
        name = settings.format if settings.precision == "fp32" else f"onnx-{settings.precision}"
        stderr.print(f"export {name}")
        try:
            write_bundle(prepared, folder.with_name(name), settings)
        except CheckFailedError as refused:
            stderr.print(f"{name}: {refused}")


if __name__ == "__main__":
    main()

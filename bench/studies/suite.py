"""The full table: one Hugging Face classifier in every runtime and peer, on real texts.

MiniLM is fine-tuned for one epoch and exported in every format; ``make peers`` adds the peers.
"""

import shutil
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

from trainkit import tables
from trainkit.bench.engines.registry import Spec, applicable
from trainkit.bench.race import runner
from trainkit.bench.report.tables import engine_labels, machine, noise, rate_text, ratio_text
from trainkit.bench.result import BenchmarkSettings, Measurement, Result, check
from trainkit.bench.studies import roofline
from trainkit.bench.studies.study import Session, Study, command_line
from trainkit.bench.studies.widened_bert import grow
from trainkit.console import stderr
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
from trainkit.tables import Table

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


@click.option("--model", type=click.Choice(["minilm", "base"]), default="minilm")
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--text-column")
@click.option("--label-column")
@click.option("--texts", default=200, show_default=True, help="Test texts, from the first.")
@click.option("--batch-size", "batch_sizes", multiple=True, type=int, default=[1, 32])
@click.option("--min-rounds", default=10, show_default=True)
@click.option("--reuse", is_flag=True, help="Race the exports of the last run.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/suite"))
def measure(
    session: Session,
    model: str,
    data: Path,
    text_column: str | None,
    label_column: str | None,
    texts: int,
    batch_sizes: tuple[int, ...],
    min_rounds: int,
    reuse: bool,
    work: Path,
) -> Result:
    """Measure one model on one data set in every runtime.

    ``base`` is the fine-tuned MiniLM widened to BERT-base's size and trained for one epoch more;
    with --reuse it runs on other data too, whose labels it does not know.
    """
    splits = load(data, Columns(text_column=text_column, label_column=label_column))
    home = work / ("base" if model == "base" else f"{model}-{data.name}")
    folder = home / "classifier"
    if not reuse:
        shutil.rmtree(home, ignore_errors=True)  # the study's own, from its last run
        _make(model, splits, folder)
        _export(folder, splits)
    bundles = sorted(path.parent for path in home.glob(f"*/{MANIFEST}"))
    # Hugging Face's own forward is the baseline.
    names = ["huggingface", *(one for one in applicable(folder) if one != "huggingface")]
    specs = [Spec(runtime, folder) for runtime in names]
    specs += [Spec(runtime, bundle) for bundle in bundles for runtime in applicable(bundle)]
    settings = BenchmarkSettings(
        batch_sizes=batch_sizes, threads=(usable_cores(),), min_seconds=5.0, min_rounds=min_rounds
    )
    return runner.run(
        specs,
        splits.test[:texts],
        settings,
        data=data.name,
        on_progress=session,
        command=command_line(),
        peak_flops={threads: roofline.measure(threads) for threads in settings.threads},
    )


def markdown(result: Result) -> str:
    """Return one table with the workloads side by side: speed, ratio, accuracy."""
    columns = ["engine"]
    for workload in result.workloads:
        columns += [f"batch {workload.batch_size}: texts/s", "ratio"]
    rows = []
    for number, label in enumerate(engine_labels(result)):
        cells, accuracy = [label], "-"
        for workload in result.workloads:
            measured = next((one for one in workload.measurements if one.engine == number), None)
            cells += _speed(measured)
            if measured and measured.accuracy is not None:
                accuracy = f"{100 * measured.accuracy:.1f}%"
        peak = (result.engines[number].peak_rss_bytes or 0) / 1e6
        rows.append((*cells, accuracy, f"{peak:,.0f}"))
    notes = [f"{result.workloads[0].texts} texts. {machine(result)}", noise(result)]
    columns += ["accuracy", "peak MB"]
    return tables.markdown(Table(columns, rows, notes=[*filter(None, notes)]))


def _speed(measured: Measurement | None) -> tuple[str, str]:
    if measured is None:
        return "-", "-"
    ratio = ratio_text(measured.ratio) if measured.ratio else "baseline"
    return rate_text(measured.texts_per_s), ratio


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
    """Export in every format; a precision that the gate refuses is logged and left out."""
    source = open_source(str(folder))
    prepared = prepare(source, (*splits.valid, *splits.train)[:GATE_TEXTS])
    for settings in EXPORTS:
        name = settings.format if settings.precision == "fp32" else f"onnx-{settings.precision}"
        stderr.print(f"export {name}")
        try:
            write_bundle(prepared, folder.with_name(name), settings)
        except CheckFailedError as refused:
            stderr.print(f"{name}: {refused}")


STUDY = Study(
    "suite",
    Result,
    measure,
    markdown,
    check,
    file=lambda options: f"suite-{options['model']}-{options['data'].name}",
)

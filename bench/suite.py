"""The full table: one Hugging Face classifier in every runtime and peer, on real texts.

``python -m trainkit.bench.suite --model minilm --data data/trec`` fine-tunes MiniLM for one epoch
(or builds a BERT-base with random weights, whose speed is the same), exports it in every format,
and races whatever there is; ``make peers`` adds the peers. Writes
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
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedModel,
    get_linear_schedule_with_warmup,
)

from trainkit.bench import race
from trainkit.bench.engines import Spec, applicable
from trainkit.bench.environment import usable_cores
from trainkit.bench.result import Settings, check, save
from trainkit.bench.tables import table
from trainkit.console import stderr, stdout, steps
from trainkit.data.columns import Columns
from trainkit.data.readers import Example
from trainkit.data.splits import Splits, load
from trainkit.export import model_file
from trainkit.export.export import export_all, target
from trainkit.export.source import open_source
from trainkit.models.backbone import quiet, resolve
from trainkit.serve.errors import CheckFailedError

__all__ = ["main"]

RESULTS = Path("bench/results")
MAX_LENGTH = 512
BATCH = 32
LEARNING_RATE = 1e-4
EXPORTS = (
    model_file.Settings(),
    model_file.Settings(precision="int8"),
    model_file.Settings(format="torchscript"),
    model_file.Settings(format="pt2"),
    model_file.Settings(format="aoti"),
)


@click.command()
@click.option("--model", type=click.Choice(["minilm", "base"]), default="minilm")
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--text-column")
@click.option("--label-column")
@click.option("--texts", default=200, show_default=True, help="Of the test set, from its start.")
@click.option("--batch-size", "batch_sizes", multiple=True, type=int, default=[1, 32])
@click.option("--min-rounds", default=10, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/suite"))
def main(
    model: str,
    data: Path,
    text_column: str | None,
    label_column: str | None,
    texts: int,
    batch_sizes: tuple[int, ...],
    min_rounds: int,
    work: Path,
) -> None:
    """Measure one model on one data set in every runtime."""
    splits = load(data, Columns(text_column=text_column, label_column=label_column))
    name = f"{model}-{data.name}"
    folder = work / name / "classifier"
    shutil.rmtree(work / name, ignore_errors=True)  # this program's own, from its last time
    _make(model, splits, folder)
    bundles = list(_export(folder, splits))
    # Hugging Face's own forward is the baseline: what everybody begins with.
    names = ["huggingface", *(one for one in applicable(folder) if one != "huggingface")]
    specs = [Spec(runtime, folder) for runtime in names]
    specs += [Spec(runtime, bundle) for bundle in bundles for runtime in applicable(bundle)]
    settings = Settings(
        batch_sizes=batch_sizes,
        threads=(usable_cores(),),
        min_seconds=5.0,
        min_rounds=min_rounds,
    )
    command = ["python", "-m", "trainkit.bench.suite", *sys.argv[1:]]
    with steps() as told:
        result = race.run(
            specs, splits.test[:texts], settings, data=data.name, progress=told, command=command
        )
    save(result, RESULTS / f"suite-{name}.json")
    stdout.print(table(result))
    check(result)


def _make(kind: str, splits: Splits, folder: Path) -> None:
    """Save a classifier of the data's labels as transformers does."""
    labels = sorted({example.label for example in splits.train})
    names: dict[str, Any] = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }
    tokenizer = AutoTokenizer.from_pretrained(resolve("minilm"))
    torch.manual_seed(0)
    with quiet():
        if kind == "base":
            config = BertConfig(**names)
            model = AutoModelForSequenceClassification.from_config(config)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(resolve("minilm"), **names)
            _finetune(model, tokenizer, splits.train)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _finetune(model: PreTrainedModel, tokenizer: Any, examples: Sequence[Example]) -> None:
    """Train for one epoch, texts of like length together: accuracy beside speed, no record."""
    batches = list(_batches(examples))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
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


def _export(folder: Path, splits: Splits) -> Iterator[Path]:
    """Export in every format; a precision that the gate refuses is left out, and said."""
    source = open_source(str(folder))
    for settings in EXPORTS:
        suffix = "" if settings.precision == "fp32" else f"-{settings.precision}"
        out = folder.with_name(f"{settings.format}{suffix}")
        goal = target(str(folder), settings.format, settings, out)
        data = splits.valid[:200] if settings.precision == "int8" else ()
        try:
            export_all(source, [goal], data=data, told=lambda step: None)
        except CheckFailedError as refused:
            stderr.print(f"{settings.format}{suffix}: {refused}")
            continue
        yield out


if __name__ == "__main__":
    main()

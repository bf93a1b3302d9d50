"""``trainkit train`` and ``trainkit evaluate``."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trainkit.commands.common import (
    SplitName,
    columns,
    data_options,
    json_option,
    print_json,
    split_option,
)

if TYPE_CHECKING:
    from trainkit.data.columns import Labels
    from trainkit.models.config import Kind
    from trainkit.trainer.config import TrainConfig

__all__ = ["evaluate", "train"]


@click.command()
@click.option("--data", "source", required=True, help="A file, a folder, or 'sample'.")
@click.option("--test", type=click.Path(path_type=Path), help="A file that is the test set.")
@click.option(
    "--model",
    "kind",
    type=click.Choice(["simple", "prefix", "finetune"]),
    required=True,
    help="From scratch; a frozen encoder with trained prefixes; or all weights of an encoder.",
)
@click.option("--backbone", help="minilm, a Hugging Face folder, or a hub id.")
@click.option("--prefix-length", default=16, show_default=True, help="Trained positions a layer.")
@click.option("--max-length", type=int, help="Tokens a text is cut to. [default: the encoder's]")
@click.option("--dropout", type=float, help="[default: 0.1 with a backbone, else 0.5]")
@click.option("--min-count", default=2, show_default=True, help="Rarer words are [UNK].")
@click.option("--epochs", type=int)
@click.option("--batch-size", type=int)
@click.option("--learning-rate", type=float, help="Of the encoder or its prefix.")
@click.option("--head-learning-rate", type=float)
@click.option("--weight-decay", type=float)
@click.option("--warmup-share", type=float, help="Of all steps.")
@click.option("--label-smoothing", type=float)
@click.option("--average-decay", type=float, help="Of the running average of the weights; 0: none.")
@click.option("--patience-epochs", type=int, help="Stop after so many without a better accuracy.")
@click.option("--seed", type=int, help="One seed makes a run repeatable.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
@click.option("--name", help="Of the run's folder. [default: model and time]")
@data_options
@json_option
def train(
    source: str,
    test: Path | None,
    kind: "Kind",
    runs: Path,
    name: str | None,
    as_json: bool,
    labels: "Labels",
    text_column: str | None,
    label_column: str | None,
    **settings: Any,
) -> None:
    """Train a classifier into runs/NAME, and point runs/latest at it.

    Settings that are not given have the defaults of their kind of model.

    \b
    trainkit train --data sample --model simple
    trainkit train --data data/trec --model prefix --backbone minilm
    """
    from trainkit.console import TrainingBar, evaluation_tables, stderr, stdout
    from trainkit.data.splits import load
    from trainkit.trainer.run import ModelChoice, start

    model_settings = {key: settings.pop(key) for key in ModelChoice.__struct_fields__[1:]}
    choice = ModelChoice(kind=kind, **model_settings)
    config = training_config(kind, settings)
    splits = load(source, columns(labels, text_column, label_column), config.seed, test)
    folder = runs / (name or f"{kind}-{datetime.now():%Y%m%d-%H%M%S}")
    with TrainingBar(config.epochs) as bar:
        run = start(choice, splits, config, folder, bar)
    if as_json:
        print_json({"run": str(folder), "best": run.trained.best, "test": run.test})
    else:
        for table in evaluation_tables(run.test):
            stdout.print(table)
        stdout.print(
            f"Held-out accuracy {100 * run.test.accuracy:.1f} % on {run.test.count} texts; "
            f"best epoch {run.trained.best.epoch}; saved in {folder}",
            highlight=False,
            soft_wrap=True,
        )
    if run.trained.interrupted:
        stderr.print("Interrupted: the best epoch so far was kept.")
        raise SystemExit(130)


def training_config(kind: "Kind", settings: dict[str, Any]) -> "TrainConfig":
    """Return the defaults of this kind of model with what was given on the command line."""
    import msgspec

    from trainkit.trainer.config import DEFAULTS

    given = {key: value for key, value in settings.items() if value is not None}
    return msgspec.structs.replace(DEFAULTS[kind], **given)


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--data", "data_source", required=True, help="A file, a folder, or 'sample'.")
@split_option
@data_options
@json_option
def evaluate(source: Path, data_source: str, split: SplitName, as_json: bool, **how: Any) -> None:
    """Score SOURCE, a run or a bundle, on labelled texts.

    \b
    trainkit evaluate runs/latest/onnx --data data/trec
    """
    from trainkit.console import evaluation_tables, stdout, steps
    from trainkit.data.splits import load_split
    from trainkit.export.runtimes import open_classifier
    from trainkit.trainer.metrics import evaluate as score

    with steps() as told:
        examples = load_split(data_source, columns(**how), split)
        told(f"open {source}")
        classifier = open_classifier(source)
        told(f"classify {len(examples)} texts")
        logits = classifier.logits([example.text for example in examples])
    evaluation = score(logits, [example.label for example in examples], classifier.labels)
    if as_json:
        print_json(evaluation)
    else:
        for table in evaluation_tables(evaluation):
            stdout.print(table)

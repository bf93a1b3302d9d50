"""``trainkit train`` and ``trainkit evaluate``."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trainkit.commands.common import (
    SplitName,
    base_option,
    columns,
    data_options,
    json_option,
    print_json,
    rate,
    split_option,
)
from trainkit.serve.errors import InputError

if TYPE_CHECKING:
    from trainkit.data.columns import Labels
    from trainkit.models.config import Kind
    from trainkit.trainer.config import TrainConfig

__all__ = ["evaluate", "train"]


@click.command()
@click.option("--data", "source", help="A file, a folder, or 'sample'.")
@click.option("--test", type=click.Path(path_type=Path), help="A file that is the test set.")
@click.option(
    "--model",
    "kind",
    type=click.Choice(["simple", "prefix", "finetune"]),
    help="From scratch; a frozen encoder with trained prefixes; or all weights of an encoder.",
)
@click.option("--backbone", help="minilm, a Hugging Face folder, or a hub id.")
@click.option("--prefix-length", default=16, show_default=True, help="Trained positions a layer.")
@click.option("--prefix-projection", is_flag=True, help="Train the prefix through an MLP.")
@click.option("--prefix-hidden", type=int, help="Hidden units of that MLP. [default: 512]")
@click.option(
    "--head",
    type=click.Choice(["mean", "own"]),
    default="mean",
    show_default=True,
    help="Over the mean of the states; or the backbone's own, so that PEFT can load a prefix.",
)
@click.option("--max-length", type=int, help="Tokens a text is cut to. [default: the encoder's]")
@click.option("--dropout", type=float, help="[default: 0.1 with a backbone, else 0.5]")
@click.option("--min-count", default=2, show_default=True, help="Rarer words are [UNK].")
@click.option("--epochs", type=int)
@click.option("--batch-size", type=int)
@click.option(
    "--learning-rate",
    "--lr",
    "learning_rate",
    type=rate,
    metavar="RATE|auto",
    help="Of the encoder or its prefix; auto: by a range test.",
)
@click.option("--head-learning-rate", type=float)
@click.option("--weight-decay", type=float)
@click.option("--warmup-share", type=float, help="Of all steps.")
@click.option("--label-smoothing", type=float)
@click.option("--average-decay", type=float, help="Of the running average of the weights; 0: none.")
@click.option("--patience-epochs", type=int, help="Stop after so many without a better accuracy.")
@click.option("--seed", type=int, help="One seed makes a run repeatable.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]))
@click.option(
    "--resume",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="RUN",
    help="Go on with a run that was cut off, with its own settings and data.",
)
@click.option(
    "--save-every", default=60.0, show_default=True, metavar="SECONDS", help="For --resume."
)
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
@click.option("--name", help="Of the run's folder. [default: model and time]")
@data_options
@json_option
def train(
    source: str | None,
    test: Path | None,
    kind: "Kind | None",
    resume: Path | None,
    save_every: float,
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
    trainkit train --resume runs/prefix-20261123-120000
    """
    from trainkit.console import TrainingBar, evaluation_tables, stderr, stdout
    from trainkit.data.splits import load
    from trainkit.trainer import plan
    from trainkit.trainer.run import start

    if resume is None:
        if source is None or kind is None:
            raise InputError("--data and --model are needed, or --resume RUN.")
        model_settings = {key: settings.pop(key) for key in plan.ModelChoice.__struct_fields__[1:]}
        choice = plan.ModelChoice(kind=kind, **model_settings)
        if automatic := settings["learning_rate"] == "auto":
            settings["learning_rate"] = None
        config = training_config(kind, settings)
        data = plan.DataSource(
            data=source if source == "sample" else str(Path(source).resolve()),
            test=None if test is None else str(test.resolve()),
            columns=columns(labels, text_column, label_column),
        )
        folder = runs / (name or f"{kind}-{datetime.now():%Y%m%d-%H%M%S}")
    else:
        _check_alone(click.get_current_context())
        earlier = plan.read(resume)
        if earlier.source is None:
            raise InputError(f"{resume} does not say where its data was; train anew.")
        automatic = False  # the rate that was chosen is one of the run's settings
        choice, config, data, folder = earlier.model, earlier.training, earlier.source, resume
    splits = load(
        data.data, data.columns, config.seed, None if data.test is None else Path(data.test)
    )
    tested = None
    if automatic:
        from trainkit.trainer.range_test import choose

        config, tested = choose(choice, splits, config)
        stderr.print(str(tested), highlight=False, soft_wrap=True)
    with TrainingBar(config.epochs) as bar:
        run = start(
            choice,
            splits,
            config,
            folder,
            bar,
            source=data,
            resume=resume is not None,
            save_every_s=save_every,
            tested=tested,
        )
    if as_json:
        print_json(
            {"run": str(folder), "best": run.trained.best, "test": run.test, "notes": run.notes}
        )
    else:
        for table in evaluation_tables(run.test):
            stdout.print(table)
        stdout.print(
            f"Held-out accuracy {100 * run.test.accuracy:.1f} % on {run.test.count} texts; "
            f"best epoch {run.trained.best.epoch}; saved in {folder}",
            highlight=False,
            soft_wrap=True,
        )
    for note in run.notes:
        stderr.print(f"note: {note}", highlight=False, soft_wrap=True)
    if run.trained.interrupted:
        stderr.print(
            "Interrupted: the best epoch so far was kept. To go on: "
            f"trainkit train --resume {run.folder}",
            soft_wrap=True,
        )
        raise SystemExit(130)


def _check_alone(context: click.Context) -> None:
    """Refuse settings beside ``--resume``: the run has its own."""
    allowed = {"resume", "save_every", "as_json"}
    given = [
        f"--{name.replace('_', '-')}"
        for name in context.params
        if name not in allowed
        and context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
    ]
    if given:
        raise InputError(
            f"{', '.join(given)} cannot be given with --resume: the run keeps its own settings."
        )


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
@base_option
@data_options
@json_option
def evaluate(
    source: Path,
    data_source: str,
    split: SplitName,
    base: str | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Score SOURCE, a run, a bundle or a PEFT adapter, on labelled texts.

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
        classifier = open_classifier(source, base)
        told(f"classify {len(examples)} texts")
        logits = classifier.logits([example.text for example in examples])
    evaluation = score(logits, [example.label for example in examples], classifier.labels)
    if as_json:
        print_json(evaluation)
    else:
        for table in evaluation_tables(evaluation):
            stdout.print(table)

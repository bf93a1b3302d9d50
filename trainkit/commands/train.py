"""``trainkit train``."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from trainkit.commands.common import (
    data_options,
    json_option,
    print_json,
    setting_options,
    source_of,
)
from trainkit.serve.errors import InputError

if TYPE_CHECKING:
    from trainkit.data.columns import Labels
    from trainkit.data.splits import Splits
    from trainkit.trainer.callbacks import TrainingCallback
    from trainkit.trainer.config import TrainConfig
    from trainkit.trainer.range_test import RangeTest
    from trainkit.trainer.run import Run
    from trainkit.trainer.run_config import DataSpec, ModelSpec

__all__ = ["train"]


@click.command()
@click.option("--data", "source", help="A file, a folder, or 'sample'.")
@click.option("--test", type=click.Path(path_type=Path), help="A file that is the test set.")
@setting_options
@click.option(
    "--resume",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="RUN",
    help="Go on with a run that was cut off, with its own settings and data.",
)
@click.option(
    "--save-every", default=60.0, show_default=True, metavar="SECONDS", help="For --resume."
)
@click.option("--tensorboard", is_flag=True, help="Write event files into the run's events/.")
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
@click.option("--name", help="Of the run's folder. [default: model and time]")
@data_options
@json_option
def train(
    source: str | None,
    test: Path | None,
    config: Path | None,
    resume: Path | None,
    save_every: float,
    tensorboard: bool,
    runs: Path,
    name: str | None,
    as_json: bool,
    labels: "Labels",
    text_column: str | None,
    label_column: str | None,
    **settings: Any,
) -> None:
    """Train a classifier into runs/NAME, and point runs/latest at it.

    Settings that are not given, as options or in the file that --config names, have the defaults
    of their kind of model. The run's folder holds all of them as config.toml.

    \b
    trainkit train --data sample --model simple
    trainkit train --data data/trec --model prefix --backbone minilm
    trainkit train --data data/trec --config runs/latest/config.toml --seed 1
    trainkit train --resume runs/prefix-20261123-120000
    torchrun --nproc-per-node 2 -m trainkit train --data data/trec --model simple
    """
    if resume is not None:
        _check_alone(click.get_current_context())
        task = _resumed(resume.resolve())  # not runs/latest, a link that will be set anew
    elif source is None or (settings["model"] is None and config is None):
        raise InputError(
            "--data and --model are needed (or --config FILE in place of --model), or --resume RUN."
        )
    else:
        choice, training, automatic = _settings(settings, config)
        data = source_of(source, test, labels, text_column, label_column)
        folder = runs / (name or f"{choice.kind}-{datetime.now():%Y%m%d-%H%M%S}")
        task = _Task(choice, training, data, folder, automatic=automatic)
    try:
        run = _run(task, save_every, tensorboard)
    except KeyboardInterrupt:
        _say_interrupted(task.folder)
        raise SystemExit(130) from None
    if run is None:
        return
    _say(run, as_json)
    if run.trained.interrupted:
        raise SystemExit(130)


class _Task(NamedTuple):
    """A training to begin, or to go on with; ``automatic``: its rate is still to be found."""

    choice: "ModelSpec"
    config: "TrainConfig"
    data: "DataSpec"
    folder: Path
    automatic: bool = False
    resumed: bool = False


def _settings(
    settings: Mapping[str, Any], file: Path | None
) -> "tuple[ModelSpec, TrainConfig, bool]":
    """Return what the options and the file of a new training name, and whether to find its rate."""
    from trainkit.trainer.settings import check_effect, resolve

    given = {name: value for name, value in settings.items() if value is not None}
    if automatic := given.get("learning_rate") == "auto":
        del given["learning_rate"]
    choice, config = resolve(given, file)
    check_effect(given, choice)
    return choice, config, automatic


def _resumed(folder: Path) -> _Task:
    """Read what the run was begun with; the rate that was found is one of its settings."""
    from trainkit.trainer import run_folder

    earlier = run_folder.read(folder)
    if earlier.source is None:
        raise InputError(
            f"{folder} was trained on data in memory: resume it from Python, or train again."
        )
    return _Task(earlier.model, earlier.training, earlier.source, folder, resumed=True)


def _run(task: _Task, save_every_s: float, tensorboard: bool) -> "Run | None":
    """Train; None in a process that only goes along with the one that leads."""
    from trainkit.console import TrainingBar
    from trainkit.data.splits import load
    from trainkit.trainer.distributed import init
    from trainkit.trainer.run import train, train_worker

    choice, config, data, folder, automatic, resumed = task
    test = None if data.test is None else Path(data.test)
    splits = load(data.data, data.columns, config.seed, test)
    config, tested = _with_rate(choice, splits, config) if automatic else (config, None)
    with init() as group:
        if not group.is_main:
            train_worker(choice, splits, config, folder, group)
            return None
        with TrainingBar(config.epochs) as bar, watched(bar, folder, tensorboard) as progress:
            return train(
                choice,
                splits,
                config,
                folder,
                progress,
                source=data,
                resume=resumed,
                save_every_s=save_every_s,
                tested=tested,
                report=True,
                group=group,
            )


def _with_rate(
    choice: "ModelSpec", splits: "Splits", config: "TrainConfig"
) -> "tuple[TrainConfig, RangeTest]":
    """Find the learning rate, and say which it is."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise InputError(
            "--learning-rate auto trains in one process: find the rate without torchrun first."
        )
    from trainkit.console import stderr
    from trainkit.trainer.range_test import choose

    config, tested = choose(choice, splits, config)
    stderr.print(str(tested), highlight=False, soft_wrap=True)
    return config, tested


def _say(run: "Run", as_json: bool) -> None:
    """Say what the training came to, and how to go on where it was interrupted."""
    from trainkit.console import calibration_line, evaluation_tables, stderr, stdout

    (stderr if as_json else stdout).print(calibration_line(run), highlight=False, soft_wrap=True)
    if as_json:
        scores = {"best": run.trained.best, "valid": run.valid, "test": run.test}
        print_json({"run": str(run.folder), **scores, "notes": run.notes})
    else:
        for table in evaluation_tables(run.test):
            stdout.print(table)
        stdout.print(
            f"Held-out accuracy {100 * run.test.accuracy:.1f} % on {run.test.count} texts; "
            f"best epoch {run.trained.best.epoch}; saved in {run.folder}",
            highlight=False,
            soft_wrap=True,
        )
    for note in run.notes:
        stderr.print(f"note: {note}", highlight=False, soft_wrap=True)
    if run.trained.interrupted:
        stderr.print("Interrupted: the best epoch so far was kept.")
        _say_interrupted(run.folder)


def _say_interrupted(folder: Path) -> None:
    """Say how to go on with a training that Ctrl-C ended, where anything was saved of it."""
    from trainkit.console import stderr

    if folder.exists():
        stderr.print(f"To go on: trainkit train --resume {folder}", soft_wrap=True)
    else:
        stderr.print("Interrupted before anything was saved.")


def watched(
    bar: "TrainingCallback", folder: Path, tensorboard: bool
) -> "AbstractContextManager[TrainingCallback]":
    """Return who is told how far the training is: the bar, and the event files where asked for."""
    if not tensorboard:
        return nullcontext(bar)
    from trainkit.trainer.event_files import EventFiles

    return EventFiles(folder, bar)


def _check_alone(context: click.Context) -> None:
    """Refuse settings beside ``--resume``: the run has its own."""
    allowed = {"resume", "save_every", "tensorboard", "as_json"}
    given = [
        option.opts[0]
        for option in context.command.params
        if option.name is not None
        and option.name not in allowed
        and context.get_parameter_source(option.name) is not click.core.ParameterSource.DEFAULT
    ]
    if given:
        raise InputError(
            f"{', '.join(given)} cannot be given with --resume: the run keeps its own settings."
        )

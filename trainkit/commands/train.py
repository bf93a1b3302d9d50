"""``trainkit train``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trainkit.commands.common import (
    A_PATH,
    column_options,
    data_option,
    json_option,
    print_json,
    print_line,
)
from trainkit.commands.options import command, option
from trainkit.commands.settings import setting_options
from trainkit.serve.errors import InputError

if TYPE_CHECKING:
    from trainkit.api.models import Run
    from trainkit.api.training import TrainingTask

INTERRUPTED = 130  # 128 + SIGINT


@command()
@data_option(None)
@option("--test", type=A_PATH, metavar="FILE", help="File that is the test set.", group="Data")
@column_options
@setting_options
@option(
    "--resume",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="RUN",
    help="Continue a run that was cut off, with its own settings and data.",
)
@option(
    "--save-every",
    "save_every_s",
    type=float,
    default=60.0,
    metavar="SECONDS",
    help="Seconds between the states that --resume continues from.",
)
@option("--tensorboard", is_flag=True, help="Write event files into the run's events/.")
@option(
    "--runs", type=A_PATH, metavar="DIRECTORY", default=Path("runs"), help="Folder of all runs."
)
@option("--name", help="Name of the run's folder.  [default: model and time]")
@json_option
def train(
    data: str | None,
    test: Path | None,
    resume: Path | None,
    config: Path | None,
    runs: Path,
    name: str | None,
    save_every_s: float,
    tensorboard: bool,
    text_column: str | None,
    label_column: str | None,
    trec_labels: Any,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train a classifier into runs/NAME, and point runs/latest at it.

    Settings that are given neither as options nor in the file of --config have the defaults of
    their kind of model. The run's folder holds all of them as config.toml.

    \b
    trainkit train --data sample --model simple
    trainkit train --data data/trec --model prefix --backbone minilm
    trainkit train --data data/trec --config runs/latest/config.toml --seed 1
    trainkit train --resume runs/prefix-20261123-120000
    torchrun --nproc-per-node 2 -m trainkit train --data data/trec --model simple
    """
    if resume is not None:
        _check_alone(click.get_current_context())
    from trainkit.api.training import new_task, resumed_task, run_task
    from trainkit.console import TrainingBar
    from trainkit.data.columns import Columns

    if resume is not None:
        task = resumed_task(resume)
    else:
        columns = Columns(trec_labels, text_column, label_column)
        task = new_task(data, settings, columns, None, test, config, runs, name)
    try:
        run = run_task(task, save_every_s, tensorboard, TrainingBar)
    except KeyboardInterrupt:
        _print_how_to_resume(task)
        raise SystemExit(INTERRUPTED) from None
    if run is None:  # torchrun's other processes
        return
    _report(run, as_json)
    if run.interrupted:
        print_line("Interrupted: the best epoch until then was kept.", stderr=True)
        _print_how_to_resume(task)
        raise SystemExit(INTERRUPTED)


def _report(run: "Run", as_json: bool) -> None:
    from trainkit.console import calibration_line, evaluation_tables, stdout

    best = run.result.trained.best
    print_line(calibration_line(run.result), stderr=as_json)
    if as_json:
        scores = {"best": best, "valid": run.valid, "test": run.test}
        print_json({"run": str(run.folder), **scores, "notes": run.notes})
    else:
        for table in evaluation_tables(run.test):
            stdout.print(table)
        print_line(
            f"Held-out accuracy {100 * run.test.accuracy:.1f}% on {run.test.count} texts; "
            f"best epoch {best.epoch}; saved in {run.folder}"
        )
    for note in run.notes:
        print_line(f"note: {note}", stderr=True)


def _print_how_to_resume(task: "TrainingTask") -> None:
    """Print how to continue a training that Ctrl-C ended, if anything of it was saved."""
    if task.folder.exists():
        print_line(f"To go on: trainkit train --resume {task.folder}", stderr=True)
    else:
        print_line("Interrupted before anything was saved.", stderr=True)


def _check_alone(context: click.Context) -> None:
    """Refuse settings beside ``--resume``: the run has its own."""
    allowed = {"resume", "save_every_s", "tensorboard", "as_json"}
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

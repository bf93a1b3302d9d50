"""``trainkit tune``."""

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
    from trainkit.trainer.tuning import PrunerName


@command()
@data_option(None, required=True)
@option(
    "--test",
    type=A_PATH,
    metavar="FILE",
    help="File that is the test set, which the search does not touch.",
    group="Data",
)
@column_options
@setting_options
@option(
    "--trials",
    type=click.IntRange(min=1),
    default=30,
    help="Trainings to have finished when the search ends.",
)
@option(
    "--study",
    type=A_PATH,
    metavar="FILE",
    help="SQLite file of the search, which continues if it exists.  [default: runs/tune-MODEL.db]",
)
@option(
    "--pruner",
    type=click.Choice(["median", "halving", "none"]),
    default="median",
    help="Rule by which trials end early.",
)
@json_option
def tune(
    data: str,
    test: Path | None,
    trials: int,
    study: Path | None,
    pruner: "PrunerName",
    config: Path | None,
    text_column: str | None,
    label_column: str | None,
    trec_labels: Any,
    as_json: bool,
    **options: Any,
) -> None:
    """Search for the settings with the highest validation accuracy; the test set is not touched.

    Settings that are given, as options or with --config, are fixed; the others are chosen. The same
    command continues its study until TRIALS are finished, also in several processes at once. The
    best settings so far are written beside the study, as a TOML file.

    \b
    trainkit tune --data data/trec --model simple --trials 40
    trainkit train --data data/trec --config runs/tune-simple.toml
    """
    from trainkit.data.columns import Columns
    from trainkit.data.splits import load
    from trainkit.trainer.settings import read, resolve
    from trainkit.trainer.tuning import tune as search

    given = {name: value for name, value in options.items() if value is not None}
    if given.get("learning_rate") == "auto":
        raise InputError(
            "--lr auto is for trainkit train; a search tries rates itself: leave it out."
        )
    fixed = ({} if config is None else read(config)) | given
    choice, training = resolve(given, config)
    file = study or Path("runs") / f"tune-{choice.kind}.db"
    splits = load(data, Columns(trec_labels, text_column, label_column), training.seed, test)

    def report(line: str) -> None:
        print_line(line, stderr=True)

    try:
        found = search(fixed, splits, file, trials=trials, pruner=pruner, on_progress=report)
    except KeyboardInterrupt:
        report(f"Interrupted: {file} keeps what is finished; the same command goes on.")
        raise SystemExit(130) from None
    if as_json:
        print_json({"study": str(file), **found._asdict(), "config": str(found.config)})
    else:
        print_line(
            f"Best validation accuracy {100 * found.valid_accuracy:.1f}%: trial {found.trial} of "
            f"{found.finished}. To train with it: trainkit train --data {data} "
            f"--config {found.config}"
        )

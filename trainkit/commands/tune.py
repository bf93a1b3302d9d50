"""``trainkit tune``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from trainkit.trainer.tuning import PrunerName

__all__ = ["tune"]


@click.command()
@click.option("--data", required=True, help="A file, a folder, or 'sample'.")
@click.option("--test", type=click.Path(path_type=Path), help="As for train: kept out.")
@click.option("--trials", type=click.IntRange(min=1), default=30, show_default=True)
@click.option(
    "--study",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="SQLite; goes on where it exists. [default: runs/tune-MODEL.db]",
)
@click.option(
    "--pruner",
    type=click.Choice(["median", "halving", "none"]),
    default="median",
    show_default=True,
    help="Which trials end early.",
)
@setting_options
@data_options
@json_option
def tune(
    data: str,
    test: Path | None,
    trials: int,
    study: Path | None,
    pruner: "PrunerName",
    config: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Search for the settings with the highest validation accuracy; the test set is not touched.

    Settings that are given, as options or with --config, are fixed; the others are chosen. The same
    command goes on with its study until TRIALS are finished, also in several processes at once. The
    best settings so far stand beside the study, as a TOML file.

    \b
    trainkit tune --data data/trec --model simple --trials 40
    trainkit train --data data/trec --config runs/tune-simple.toml
    """
    from trainkit.console import stderr, stdout
    from trainkit.data.splits import load
    from trainkit.trainer.settings import read, resolve
    from trainkit.trainer.tuning import tune as search

    how = {name: options.pop(name) for name in ("labels", "text_column", "label_column")}
    given = {name: value for name, value in options.items() if value is not None}
    if given.get("learning_rate") == "auto":
        raise InputError(
            "--lr auto is for trainkit train; a search tries rates itself: leave it out."
        )
    fixed = ({} if config is None else read(config)) | given
    choice, training = resolve(given, config)
    source = source_of(data, test, **how)
    file = study or Path("runs") / f"tune-{choice.kind}.db"
    splits = load(source.data, source.columns, training.seed, test)

    def told(line: str) -> None:
        stderr.print(line, highlight=False, markup=False, soft_wrap=True)

    try:
        found = search(fixed, splits, file, trials=trials, pruner=pruner, on_progress=told)
    except KeyboardInterrupt:
        told(f"Interrupted: {file} keeps what is finished; the same command goes on.")
        raise SystemExit(130) from None
    if as_json:
        print_json({"study": str(file), **found._asdict(), "config": str(found.config)})
    else:
        stdout.print(
            f"Best validation accuracy {100 * found.valid_accuracy:.1f} %: trial {found.trial} of "
            f"{found.finished}. To train with it: trainkit train --data {data} "
            f"--config {found.config}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

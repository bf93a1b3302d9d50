"""What the commands share: arguments, options of data files, JSON output."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from trainkit.commands.options import option

A_PATH = click.Path(path_type=Path)
A_FILE = click.Path(path_type=Path, dir_okay=False)
A_FOLDER = click.Path(path_type=Path, file_okay=False)
Function = TypeVar("Function", bound=Callable[..., Any])

base_option = option("--base", metavar="MODEL", help="Base model of a PEFT adapter, if it moved.")
json_option = option(
    "--json", "as_json", is_flag=True, help="Print one JSON document instead of tables."
)
out_option = option("--out", type=A_PATH, help="JSON file to write the result to.", group="Output")
split_option = option(
    "--split",
    type=click.Choice(["train", "valid", "test", "all"]),
    help="Split of --data to use.  [default: test; all of a single file]",
    group="Data",
)


def data_option(
    default: str | None = "sample", *, required: bool = False
) -> Callable[[Function], Function]:
    """Return the option ``--data``."""
    help = "Labelled texts: a file, a folder, or 'sample' (the project's own questions)."
    return option(
        "--data", metavar="PATH", default=default, required=required, help=help, group="Data"
    )


def column_options(function: Function) -> Function:
    """Add the options for the columns of a data file."""
    for declare in (
        option("--label-column", help="Column (or JSON key) of the label.", group="Data"),
        option("--text-column", help="Column (or JSON key) of the text.", group="Data"),
        option(
            "--labels",
            "trec_labels",
            type=click.Choice(["coarse", "fine"]),
            default="coarse",
            help="Labels to read from a TREC file.",
            group="Data",
        ),
    ):
        function = declare(function)
    return function


def print_json(document: Any) -> None:
    """Print one document on standard output."""
    from trainkit.serve.files import pretty_json

    sys.stdout.buffer.write(pretty_json(document))
    sys.stdout.flush()


def print_line(line: str, *, stderr: bool = False) -> None:
    """Print a line that holds a user's words: without colours, and never wrapped."""
    from trainkit import console

    target = console.stderr if stderr else console.stdout
    target.print(line, highlight=False, markup=False, soft_wrap=True)


def typed_command() -> list[str]:
    """Return the command line that was typed, for a report."""
    return ["trainkit", *sys.argv[1:]]

"""What the commands share: the options of data files, the split to score, JSON output."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import click

if TYPE_CHECKING:
    from trainkit.data.columns import Columns, Labels

__all__ = [
    "SplitName",
    "base_option",
    "columns",
    "data_options",
    "json_option",
    "print_json",
    "rate",
    "split_option",
]

SplitName: TypeAlias = Literal["train", "valid", "test", "all"]
Command = TypeVar("Command", bound=Callable[..., Any])


def data_options(command: Command) -> Command:
    """Add the options that say how a data file is read."""
    for option in (
        click.option("--label-column", help="Column (or JSON key) of the label."),
        click.option("--text-column", help="Column (or JSON key) of the text."),
        click.option(
            "--labels",
            type=click.Choice(["coarse", "fine"]),
            default="coarse",
            show_default=True,
            help="Which label of a TREC file to take.",
        ),
    ):
        command = option(command)
    return command


def columns(labels: "Labels", text_column: str | None, label_column: str | None) -> "Columns":
    """Gather what :func:`data_options` adds."""
    from trainkit.data.columns import Columns

    return Columns(labels=labels, text_column=text_column, label_column=label_column)


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document instead of tables."
)


base_option = click.option("--base", help="The model that a PEFT adapter belongs to, if it moved.")


split_option = click.option(
    "--split",
    type=click.Choice(["train", "valid", "test", "all"]),
    default="test",
    show_default=True,
    help="Of a folder or the sample; a single file is taken whole.",
)


def rate(value: str) -> float | Literal["auto"]:
    """Read a learning rate, or the word "auto"."""
    if value == "auto":
        return "auto"
    try:
        return float(value)
    except ValueError:
        raise click.BadParameter(f"'{value}' is neither a number nor 'auto'.") from None


def print_json(document: Any) -> None:
    """Print one document on standard output."""
    from trainkit.serve.files import pretty_json

    sys.stdout.buffer.write(pretty_json(document))
    sys.stdout.flush()

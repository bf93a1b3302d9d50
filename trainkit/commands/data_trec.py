"""``trainkit data trec``."""

from pathlib import Path

import click

from trainkit.commands.common import A_PATH
from trainkit.commands.options import command, option


@command("trec")
@option(
    "--from",
    "source",
    type=A_PATH,
    help="Folder that holds the two files already, for machines without a network.",
)
@option(
    "--to",
    "target",
    type=A_PATH,
    default=Path("data/trec"),
    help="Folder to write the two files into.",
)
def data_trec(source: Path | None, target: Path) -> None:
    """Fetch the official TREC question files and check their sha256.

    \b
    trainkit data trec --to data/trec
    """
    from trainkit.data.trec import fetch

    for path in fetch(target, source):
        click.echo(path)

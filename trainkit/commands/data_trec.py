"""``trainkit data trec``."""

from pathlib import Path

import click

__all__ = ["data_trec"]


@click.command("trec")
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path),
    help="A folder that holds the two files already, for machines without a network.",
)
@click.option(
    "--to", "target", type=click.Path(path_type=Path), default=Path("data/trec"), show_default=True
)
def data_trec(source: Path | None, target: Path) -> None:
    """Fetch the official TREC question files and check their sha256.

    \b
    trainkit data trec --to data/trec
    """
    from trainkit.data.trec import fetch

    for path in fetch(target, source):
        click.echo(path)

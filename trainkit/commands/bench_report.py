"""``trainkit bench report``."""

from pathlib import Path

import click

from trainkit.commands.common import A_FILE

__all__ = ["report"]


@click.command()
@click.argument("result", type=A_FILE)
@click.option("--html", "html_path", type=A_FILE, help="One page with plots, nothing outside it.")
@click.option("--markdown", "markdown_path", type=A_FILE, help="The tables, to paste.")
@click.option("--csv", "csv_path", type=A_FILE, help="One row a measurement, all figures.")
def report(
    result: Path, html_path: Path | None, markdown_path: Path | None, csv_path: Path | None
) -> None:
    """Draw RESULT, which `trainkit bench run --out` wrote; as tables here where no file is named.

    \b
    trainkit bench report bench.json --html bench.html
    """
    from trainkit.bench.report import tables
    from trainkit.bench.result import load
    from trainkit.console import stdout

    loaded = load(result)
    if html_path is not None:
        from trainkit.bench.report.html import html

        _write(html_path, html(loaded))
    if markdown_path is not None:
        _write(markdown_path, tables.markdown(loaded))
    if csv_path is not None:
        _write(csv_path, tables.csv(loaded))
    if html_path is markdown_path is csv_path is None:
        stdout.print(tables.table(loaded))


def _write(path: Path, content: str) -> None:
    from trainkit.bench import files

    files.write(path, content.encode())
    click.echo(f"Wrote {path}")

"""``trainkit bench report``."""

from pathlib import Path

import click

from trainkit.commands.common import A_FILE
from trainkit.commands.options import command, option


@command()
@click.argument("result", type=A_FILE)
@option("--html", "html_path", type=A_FILE, help="HTML page to write, with plots inside it.")
@option("--markdown", "markdown_path", type=A_FILE, help="Markdown file to write the tables to.")
@option("--csv", "csv_path", type=A_FILE, help="CSV file to write, one row per measurement.")
def report(
    result: Path, html_path: Path | None, markdown_path: Path | None, csv_path: Path | None
) -> None:
    """Draw RESULT, which `trainkit bench run --out` wrote; without options, print its tables.

    \b
    trainkit bench report bench.json --html bench.html
    """
    from trainkit import Benchmark
    from trainkit.bench.report.tables import table
    from trainkit.console import stdout

    loaded = Benchmark.load(result)
    outputs = {
        html_path: loaded.to_html,
        markdown_path: loaded.to_markdown,
        csv_path: loaded.to_csv,
    }
    for path, write in outputs.items():
        if path is not None:
            write(path)
            click.echo(f"Wrote {path}")
    if set(outputs) == {None}:
        stdout.print(table(loaded.result))

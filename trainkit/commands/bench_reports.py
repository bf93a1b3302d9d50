"""``trainkit bench report``, ``compare`` and ``recommend``: what a benchmark's report says."""

from pathlib import Path

import click

from trainkit.commands.common import json_option, print_json

__all__ = ["compare", "recommend", "report"]

A_FILE = click.Path(path_type=Path, dir_okay=False)


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


@click.command()
@click.argument("a", type=A_FILE)
@click.argument("b", type=A_FILE)
@click.option(
    "--fail-if-slower",
    metavar="PERCENT",
    help="As 5%: exit 1 where an engine lost more speed than that, beyond its interval.",
)
@json_option
def compare(a: Path, b: Path, fail_if_slower: str | None, as_json: bool) -> None:
    """Compare report B with report A, engine by engine: what became faster or slower.

    \b
    trainkit bench compare before.json after.json --fail-if-slower 5%
    """
    from trainkit.bench.report import compare as comparing
    from trainkit.bench.result import load
    from trainkit.console import stdout

    limit = None if fail_if_slower is None else comparing.parse_share(fail_if_slower)
    comparison = comparing.compare(load(a), load(b))
    if as_json:
        print_json(comparison)
    else:
        stdout.print(comparing.table(comparison))
    if limit is not None:
        comparing.check(comparison, limit)


@click.command()
@click.argument("result", type=A_FILE)
@click.option(
    "--latency-below", type=float, metavar="MS", help="Most texts/s whose batches take less."
)
@click.option("--throughput", is_flag=True, help="Most texts/s, however long a batch takes.")
@click.option("--min-accuracy", type=float, metavar="PERCENT")
@click.option(
    "--max-accuracy-drop", type=float, metavar="POINTS", help="Below the first engine's accuracy."
)
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16", "int8"]))
@click.option(
    "--write",
    "bundle",
    type=click.Path(path_type=Path, file_okay=False),
    help="Put threads and batch size into this bundle, which must be the one recommended.",
)
@json_option
def recommend(
    result: Path,
    latency_below: float | None,
    throughput: bool,
    min_accuracy: float | None,
    max_accuracy_drop: float | None,
    precision: str | None,
    bundle: Path | None,
    as_json: bool,
) -> None:
    """Name the runtime, threads, batch size and precision to deploy, with the evidence.

    Exits 1 where nothing fits.

    \b
    trainkit bench recommend bench.json --latency-below 50
    """
    from trainkit.bench.report import recommend as recommending
    from trainkit.bench.result import load
    from trainkit.serve.errors import InputError

    if throughput == (latency_below is not None):
        raise InputError("say what is wanted: either --latency-below MS or --throughput.")
    wanted = recommending.Wanted(
        latency_below_ms=latency_below,
        min_accuracy=min_accuracy,
        max_accuracy_drop=max_accuracy_drop,
        precision=precision,
    )
    found = recommending.recommend(load(result), wanted)
    if as_json:
        print_json(found)
    else:
        click.echo(recommending.text(found))
    recommending.check(found)
    if bundle is not None:
        recommending.write(found, bundle)
        click.echo(f"Wrote {bundle}: Classifier.load takes these as defaults", err=as_json)

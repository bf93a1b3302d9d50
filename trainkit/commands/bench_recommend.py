"""``trainkit bench recommend``."""

from pathlib import Path
from typing import Any

import click

from trainkit.commands.common import A_FILE, A_FOLDER, json_option, print_json
from trainkit.commands.options import command, option
from trainkit.serve.errors import InputError


@command()
@click.argument("result", type=A_FILE)
@option(
    "--latency-below",
    "latency_below_ms",
    type=float,
    metavar="MS",
    help="Latency limit of a batch in milliseconds; of what keeps it, the most texts/s win.",
)
@option("--throughput", is_flag=True, help="Take the most texts/s, without a latency limit.")
@option("--min-accuracy", type=float, metavar="PERCENT", help="Lowest acceptable accuracy.")
@option(
    "--max-accuracy-drop",
    type=float,
    metavar="POINTS",
    help="Percentage points that the accuracy may be below that of the first engine.",
)
@option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
    help="Precision to recommend.  [default: any]",
)
@option(
    "--write",
    "bundle",
    type=A_FOLDER,
    help="Bundle to write threads and batch size into, which must be the recommended one.",
)
@json_option
def recommend(
    result: Path, throughput: bool, bundle: Path | None, as_json: bool, **limits: Any
) -> None:
    """Name the runtime, threads, batch size and precision to deploy, with the evidence.

    Exits with 1 if nothing fits.

    \b
    trainkit bench recommend bench.json --latency-below 50
    """
    if throughput == (limits["latency_below_ms"] is not None):
        raise InputError("say what is wanted: either --latency-below MS or --throughput.")
    from trainkit import Benchmark
    from trainkit.bench.report import recommend as recommending

    found = Benchmark.load(result).recommend(**limits)
    if as_json:
        print_json(found)
    else:
        click.echo(recommending.text(found))
    recommending.check(found)
    if bundle is not None:
        recommending.write(found, bundle)
        click.echo(f"Wrote {bundle}: Classifier.load takes these as defaults", err=as_json)

"""``trainkit bench recommend``."""

from pathlib import Path

import click

from trainkit.commands.common import A_FILE, json_option, print_json

__all__ = ["recommend"]


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

"""``trainkit bench load``: how a server behaves under load."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click

from trainkit.commands.common import (
    SplitName,
    columns,
    data_options,
    json_option,
    print_json,
    split_option,
)
from trainkit.serve.errors import InputError

__all__ = ["load"]

INTERRUPTED = 130  # 128 + SIGINT: what was measured is there, and is not what was asked for


@click.command()
@click.argument("url")
@click.option("--data", "data_source", default="sample", show_default=True)
@split_option
@click.option(
    "--protocol",
    type=click.Choice(["classify", "v2"]),
    help='classify: {"texts": [...]}; v2: Open Inference Protocol. [default: v2 for .../infer]',
)
@click.option(
    "--rate", default=50.0, show_default=True, help="Requests a second; where a search begins."
)
@click.option(
    "--arrivals", type=click.Choice(["poisson", "constant"]), default="poisson", show_default=True
)
@click.option("--duration", default=10.0, show_default=True, help="Seconds of one rate.")
@click.option("--max-requests", default=100_000, show_default=True, help="Of one rate.")
@click.option("--warm-up", default=2.0, show_default=True, help="Seconds before, not counted.")
@click.option(
    "--timeout", default=10.0, show_default=True, help="Seconds, from when a request was due."
)
@click.option("--connections", default=256, show_default=True, help="At most.")
@click.option("--texts-per-request", default=1, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the Poisson arrivals.")
@click.option(
    "--header", "headers", multiple=True, metavar="NAME:VALUE", help="May be repeated; never kept."
)
@click.option("--find-rate", is_flag=True, help="Search for the highest rate that is borne.")
@click.option("--p99-below", type=float, help="Milliseconds: what --find-rate keeps to.")
@click.option("--max-seconds", default=300.0, show_default=True, help="Of a search.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Keep the result, samples too, as JSON."
)
@data_options
@json_option
def load(
    url: str,
    data_source: str,
    split: SplitName | None,
    protocol: str | None,
    rate: float,
    arrivals: Literal["poisson", "constant"],
    duration: float,
    max_requests: int,
    warm_up: float,
    timeout: float,
    connections: int,
    texts_per_request: int,
    seed: int,
    headers: tuple[str, ...],
    find_rate: bool,
    p99_below: float | None,
    max_seconds: float,
    out: Path | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Send texts to the server at URL when they are due, whatever became of the others before.

    Latency counts from the moment that a request was due, so that a stall shows in full. Ctrl-C
    ends it with what was measured (exit 130).

    \b
    trainkit bench load http://127.0.0.1:8000/classify --rate 200 --data questions.csv
    trainkit bench load http://127.0.0.1:8000/v2/models/m/infer --find-rate --p99-below 50
    """
    if find_rate != (p99_below is not None):
        raise InputError("--find-rate and --p99-below belong together; give both or neither.")
    given = dict(map(_header, headers))

    from trainkit.bench.load import generator
    from trainkit.bench.load.protocols import guess_protocol, public_url
    from trainkit.bench.load.result import LoadSettings, save
    from trainkit.bench.load.tables import table
    from trainkit.console import stdout, steps
    from trainkit.data.splits import load_split

    settings = LoadSettings(
        protocol=protocol or guess_protocol(url),
        arrivals=arrivals,
        rate=rate,
        duration_s=duration,
        warm_up_s=warm_up,
        max_requests=max_requests,
        timeout_s=timeout,
        connections=connections,
        texts_per_request=texts_per_request,
        seed=seed,
        p99_below_ms=p99_below,
        max_seconds=max_seconds,
    )
    texts = [example.text for example in load_split(data_source, columns(**how), split)]
    with steps() as told:
        result = generator.run(
            generator.Target(url, texts, given),
            settings,
            data=data_source,
            command=_command(url, public_url(url), headers),
            on_progress=told,
        )
    if out is not None:
        save(result, out)
    if as_json:
        print_json(result)
    else:
        stdout.print(table(result))
    if result.interrupted:
        raise SystemExit(INTERRUPTED)


def _header(given: str) -> tuple[str, str]:
    name, colon, value = given.partition(":")
    if not colon or not name.strip():
        # Not the text itself: what stands there instead may be the secret alone.
        raise InputError('a --header has no NAME; write it as --header "Authorization:Bearer ...".')
    return name.strip(), value.strip()


def _command(url: str, shown: str, headers: Sequence[str]) -> list[str]:
    """Return what was typed, without what is secret in it."""
    secrets = {url: shown} | {given: f"{given.partition(':')[0]}:***" for given in headers}
    typed = list(sys.argv[1:])
    for secret, instead in secrets.items():
        typed = [argument.replace(secret, instead) for argument in typed]
    return ["trainkit", *typed]

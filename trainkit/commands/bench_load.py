"""``trainkit bench load``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from trainkit.bench.load.settings import LoadSettings
from trainkit.commands.common import (
    column_options,
    data_option,
    json_option,
    out_option,
    print_json,
    split_option,
    typed_command,
)
from trainkit.commands.options import command, option, options_of
from trainkit.serve.errors import InputError

INTERRUPTED = 130  # 128 + SIGINT: there are measurements, but not all that were asked for


@command()
@click.argument("url")
@data_option()
@split_option
@column_options
@options_of(LoadSettings, "protocol", defaults={"protocol": "v2 for .../infer, else classify"})
@options_of(LoadSettings, without=["protocol"])
@option(
    "--find-rate",
    is_flag=True,
    help="Search for the highest rate that keeps --p99-below without errors.",
    group="Search",
)
@option(
    "--header",
    "headers",
    multiple=True,
    metavar="NAME:VALUE",
    help="HTTP header to send; may be repeated. Its value is never written to a report.",
    group="Load",
)
@out_option
@json_option
def load(
    url: str,
    data: str,
    split: Any,
    text_column: str | None,
    label_column: str | None,
    trec_labels: Any,
    headers: tuple[str, ...],
    find_rate: bool,
    out: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Send texts to the server at URL at their due times, however it answers.

    Latency counts from the moment that a request was due, so that a stall shows in full. Ctrl-C
    ends it with what was measured (exit 130).

    \b
    trainkit bench load http://127.0.0.1:8000/classify --rate 200 --data questions.csv
    trainkit bench load http://127.0.0.1:8000/v2/models/m/infer --find-rate --p99-below 50
    """
    if find_rate != (settings["p99_below_ms"] is not None):
        raise InputError("--find-rate and --p99-below belong together; give both or neither.")
    given = dict(map(_header, headers))

    from trainkit.api.inputs import progress
    from trainkit.bench.load import generator
    from trainkit.bench.load.protocols import guess_protocol, public_url
    from trainkit.bench.load.result import save
    from trainkit.bench.load.tables import table
    from trainkit.console import stdout
    from trainkit.data.columns import Columns
    from trainkit.data.splits import load_split

    settings["protocol"] = settings["protocol"] or guess_protocol(url)
    chosen = LoadSettings(**settings)
    columns = Columns(trec_labels, text_column, label_column)
    texts = [example.text for example in load_split(data, columns, split)]
    with progress(None) as report:
        result = generator.run(
            generator.Target(url, texts, given),
            chosen,
            data=data,
            command=_command(url, public_url(url), headers),
            on_progress=report,
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
    typed = typed_command()
    for secret, instead in secrets.items():
        typed = [argument.replace(secret, instead) for argument in typed]
    return typed

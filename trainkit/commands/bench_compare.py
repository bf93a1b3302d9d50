"""``trainkit bench compare``."""

from pathlib import Path

import click

from trainkit.commands.common import A_FILE, json_option, print_json
from trainkit.commands.options import command, option


@command()
@click.argument("a", type=A_FILE)
@click.argument("b", type=A_FILE)
@option(
    "--fail-if-slower",
    metavar="PERCENT",
    help="Loss of speed, such as 5%, beyond which (and its interval) an engine makes the command "
    "exit with 1.",
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

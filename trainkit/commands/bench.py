"""``trainkit bench``: the group of its commands."""

import click

from trainkit.commands.bench_compare import compare
from trainkit.commands.bench_load import load
from trainkit.commands.bench_recommend import recommend
from trainkit.commands.bench_report import report
from trainkit.commands.bench_run import bench_run


@click.group()
def bench() -> None:
    """Measure runtimes against each other, and a server under load.

    \b
    trainkit bench run --data questions.csv --out bench.json
    trainkit bench recommend bench.json --latency-below 20
    """


for command in (bench_run, load, report, compare, recommend):
    bench.add_command(command)

"""``trainkit bench run``."""

from pathlib import Path
from typing import Any

import click

from trainkit.commands.common import (
    A_PATH,
    column_options,
    data_option,
    json_option,
    out_option,
    print_json,
    split_option,
    typed_command,
)
from trainkit.commands.options import command, option

WORK, MEASURE = "Workloads", "Measurement"


@command("run")
@click.argument("sources", nargs=-1, metavar="[RUNTIME:]SOURCE ...")
@option("--all", "all_runtimes", is_flag=True, help="Add every runtime that can take each SOURCE.")
@data_option()
@split_option
@column_options
@option(
    "--batch-size",
    "batch_sizes",
    multiple=True,
    type=int,
    default=[32],
    help="Texts per batch; may be repeated.",
    group=WORK,
)
@option(
    "--length",
    "lengths",
    multiple=True,
    type=int,
    metavar="TOKENS",
    help="Length of additional batches without padding; may be repeated.",
    group=WORK,
)
@option("--single-stream", is_flag=True, help="Also time one text after the other.", group=WORK)
@option(
    "--rate",
    "rates",
    multiple=True,
    type=float,
    metavar="REQUESTS/S",
    help="Rate of Poisson arrivals to time as well; may be repeated.",
    group=WORK,
)
@option(
    "--threads",
    multiple=True,
    type=int,
    help="Threads of each engine; may be repeated.  [default: one per core]",
    group=MEASURE,
)
@option(
    "--min-seconds",
    type=float,
    default=10.0,
    help="Shortest time of each engine on each workload, in seconds.",
    group=MEASURE,
)
@option(
    "--min-rounds",
    type=int,
    default=20,
    help="Fewest rounds of each engine on each workload.",
    group=MEASURE,
)
@out_option
@option(
    "--samples", type=A_PATH, help="NPZ file to write the time of every batch to.", group="Output"
)
@json_option
def bench_run(sources: tuple[str, ...], out: Path | None, as_json: bool, **options: Any) -> None:
    """Time runtimes on one model, in turns, each in a process of its own.

    SOURCE is a run, a bundle or a Hugging Face folder; without RUNTIME a bundle runs in that of its
    format, all else in PyTorch. The first is the baseline, whose outputs the others must repeat.
    Without any: runs/latest in PyTorch, and each bundle exported from it.

    \b
    trainkit bench run runs/latest runs/latest/onnx --data data/trec --out bench.json
    trainkit bench run compile:runs/latest runs/latest/onnx --threads 1 --threads 2
    trainkit bench run runs/latest/onnx --batch-size 1 --batch-size 8 --length 128 --rate 20
    """
    from trainkit import benchmark
    from trainkit.bench.files import check_writable
    from trainkit.bench.report.tables import table
    from trainkit.console import stdout

    if out is not None:
        check_writable(out)  # before the race, whose result would be lost
    measured = benchmark(sources, **options, command=typed_command())
    if out is not None:
        measured.save(out)
    if as_json:
        print_json(measured.result)
    else:
        stdout.print(table(measured.result))
    measured.check()

"""``trainkit bench run``."""

import sys
from pathlib import Path
from typing import Any

import click

from trainkit.commands.common import (
    SplitName,
    columns,
    data_options,
    json_option,
    print_json,
    split_option,
)

__all__ = ["bench_run"]


@click.command("run")
@click.argument("engines", nargs=-1, metavar="[RUNTIME:]SOURCE ...")
@click.option("--all", "every", is_flag=True, help="Every runtime that can take each SOURCE.")
@click.option("--data", "data_source", default="sample", show_default=True)
@split_option
@click.option(
    "--batch-size", "batch_sizes", multiple=True, type=int, default=[32], show_default=True
)
@click.option(
    "--length", "lengths", multiple=True, type=int, help="Full batches of that length too."
)
@click.option("--single-stream", is_flag=True, help="One text after the other too.")
@click.option("--rate", "rates", multiple=True, type=float, help="Poisson arrivals a second too.")
@click.option("--threads", multiple=True, type=int, help="Of each engine. [default: one a core]")
@click.option("--min-seconds", default=10.0, show_default=True, help="Of each engine and workload.")
@click.option("--min-rounds", default=20, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="JSON file for the result.")
@click.option(
    "--samples", type=click.Path(path_type=Path), help=".npz file for the time of every batch."
)
@data_options
@json_option
def bench_run(
    engines: tuple[str, ...],
    every: bool,
    data_source: str,
    split: SplitName | None,
    batch_sizes: tuple[int, ...],
    lengths: tuple[int, ...],
    single_stream: bool,
    rates: tuple[float, ...],
    threads: tuple[int, ...],
    min_seconds: float,
    min_rounds: int,
    out: Path | None,
    samples: Path | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Time runtimes on one model, in turns, each in a process of its own.

    SOURCE is a run, a bundle or a Hugging Face folder; without RUNTIME a bundle runs in that of its
    format, all else in PyTorch. The first is the baseline; the others' outputs must be the same.
    Without any: runs/latest in PyTorch, and each bundle exported from it.

    \b
    trainkit bench run runs/latest runs/latest/onnx --data data/trec --out bench.json
    trainkit bench run compile:runs/latest runs/latest/onnx --threads 1 --threads 2
    trainkit bench run runs/latest/onnx --batch-size 1 --batch-size 8 --length 128 --rate 20
    """
    from trainkit.bench.engines.registry import applicable, parse
    from trainkit.bench.race import runner
    from trainkit.bench.report.tables import table
    from trainkit.bench.result import BenchmarkSettings, check, save
    from trainkit.console import stdout, steps
    from trainkit.data.splits import load_split
    from trainkit.export.runtimes import training_seed
    from trainkit.serve.bundle import MODEL_FILES
    from trainkit.serve.cores import usable_cores

    if not engines:
        latest = Path("runs/latest")
        bundles = (latest / name for name in sorted(MODEL_FILES, reverse=True))
        engines = (str(latest), *(str(bundle) for bundle in bundles if bundle.is_dir()))
    specs = [parse(engine) for engine in engines]
    if every:
        specs += [
            parse(f"{runtime}:{spec.source}")
            for spec in list(specs)
            for runtime in applicable(spec.source)
        ]
    settings = BenchmarkSettings(
        batch_sizes=batch_sizes,
        lengths=lengths,
        rates=rates,
        single_stream=single_stream,
        threads=threads or (usable_cores(),),
        min_seconds=min_seconds,
        min_rounds=min_rounds,
    )
    seed = training_seed(specs[0].source) if specs else 0
    examples = load_split(data_source, columns(**how), split, seed)
    with steps() as told:
        result = runner.run(
            list(dict.fromkeys(specs)),
            examples,
            settings,
            data=Path(data_source).name,
            on_progress=told,
            command=["trainkit", *sys.argv[1:]],
            samples=samples,
        )
    if out is not None:
        save(result, out)
    if as_json:
        print_json(result)
    else:
        stdout.print(table(result))
    check(result)

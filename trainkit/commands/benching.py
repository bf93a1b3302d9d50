"""``trainkit bench``: measure runtimes against each other."""

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

__all__ = ["bench"]


@click.group()
def bench() -> None:
    """Measure runtimes against each other.

    \b
    trainkit bench run --data questions.csv
    """


@bench.command("run")
@click.argument("sources", nargs=-1, type=click.Path(path_type=Path))
@click.option("--data", "data_source", default="sample", show_default=True)
@split_option
@click.option("--batch-size", default=32, show_default=True)
@click.option("--threads", type=int, help="Of each engine. [default: one a core]")
@click.option("--min-seconds", default=10.0, show_default=True, help="Of each engine.")
@click.option("--min-rounds", default=20, show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Keep the result, samples too, as JSON."
)
@data_options
@json_option
def bench_run(
    sources: tuple[Path, ...],
    data_source: str,
    split: SplitName,
    batch_size: int,
    threads: int | None,
    min_seconds: float,
    min_rounds: int,
    out: Path | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Time SOURCES, runs and bundles, in turns, each in a process of its own.

    The first is the baseline; the others' outputs must be the same. Without SOURCES: runs/latest in
    PyTorch, and each bundle exported from it.

    \b
    trainkit bench run runs/latest runs/latest/onnx --data data/trec --out bench.json
    """
    from trainkit.bench import race
    from trainkit.bench.result import check, save
    from trainkit.bench.tables import table
    from trainkit.console import stdout, steps
    from trainkit.data.splits import load_split
    from trainkit.serve.bundle import MODEL_FILES

    latest = Path("runs/latest")
    if not sources:
        bundles = (latest / name for name in sorted(MODEL_FILES, reverse=True))
        sources = (latest, *(bundle for bundle in bundles if bundle.is_dir()))
    texts = [example.text for example in load_split(data_source, columns(**how), split)]
    with steps() as told:
        result = race.run(
            sources,
            texts,
            batch_size=batch_size,
            threads=threads,
            min_seconds=min_seconds,
            min_rounds=min_rounds,
            progress=told,
            command=["trainkit", *sys.argv[1:]],
        )
    if out is not None:
        save(result, out)
    if as_json:
        print_json(result)
    else:
        stdout.print(table(result))
    check(result)

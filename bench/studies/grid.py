"""trainkit beside the others on full batches of every size and length, where padding costs none.

``python -m trainkit.bench.studies grid FOLDER --data DATA``, the suite's folder of one model, races
the tokens of DATA's test texts in batches without padding, in which nothing is saved by leaving
padding out. Writes ``bench/results/grid-NAME.json``. Every engine keeps the memory of its largest
batch: 64 x 512 of MiniLM takes more than 24 GB in a dozen of them.
"""

import sys
from pathlib import Path

import click

from trainkit.bench.engines.registry import Spec, applicable
from trainkit.bench.race import runner
from trainkit.bench.race.protocol import Work
from trainkit.bench.race.workload import Workload, prepare
from trainkit.bench.result import BenchmarkSettings, Result, WorkloadResult, check, save
from trainkit.bench.studies import speedups
from trainkit.bench.studies.quiet_machine import wait_until_quiet
from trainkit.bench.studies.speedups import Goals
from trainkit.cli_errors import ErrorReportingCommand
from trainkit.console import steps
from trainkit.data.columns import Columns
from trainkit.data.readers import Example
from trainkit.data.splits import load_split
from trainkit.serve.cores import usable_cores

__all__ = ["main", "markdown"]

RESULTS = Path("bench/results")
BATCH_SIZES = (1, 8, 32)
LENGTHS = (1, 8, 32, 128, 512)
TEXTS = 200
LONG = 4096  # tokens, from which one batch a round is enough


@click.command(cls=ErrorReportingCommand)
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--name", default="minilm", show_default=True)
@click.option("--batch-size", "batch_sizes", multiple=True, type=int, default=BATCH_SIZES)
@click.option("--length", "lengths", multiple=True, type=int, default=LENGTHS)
@click.option("--min-seconds", default=1.0, show_default=True, help="Of each engine and shape.")
@click.option("--min-rounds", default=5, show_default=True)
@click.option("--calm-minutes", default=0.0, help="To wait for a calm machine.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(
    folder: Path,
    data: Path,
    name: str,
    batch_sizes: tuple[int, ...],
    lengths: tuple[int, ...],
    min_seconds: float,
    min_rounds: int,
    calm_minutes: float,
    out: Path,
) -> None:
    """Race FOLDER/classifier in the others' runtimes, and FOLDER's bundles in ONNX Runtime."""
    classifier = folder / "classifier"
    specs = [Spec(one, classifier) for one in applicable(classifier) if one in speedups.OTHERS]
    for bundle in (folder / "onnx", folder / "onnx-int8"):
        specs += [Spec(runtime, bundle) for runtime in speedups.OURS]
    settings = BenchmarkSettings(
        batch_sizes=batch_sizes,
        lengths=lengths,
        threads=(usable_cores(),),
        min_seconds=min_seconds,
        min_rounds=min_rounds,
    )
    texts = [Example(example.text, "") for example in load_split(data, Columns())[:TEXTS]]
    made = prepare([spec.source for spec in specs], texts, settings)
    with steps() as told:
        wait_until_quiet(60 * calm_minutes, told)
        result = runner.run_on(
            [_short(one) for one in made if one.length is not None],  # not the texts themselves
            specs,
            settings,
            data=data.name,
            on_progress=told,
            command=["python", "-m", "trainkit.bench.studies.grid", *sys.argv[1:]],
        )
    save(result, out / f"grid-{name}.json")
    click.echo(markdown(result))
    check(result)


def _short(workload: Workload) -> Workload:
    """Take one of the batches where they are long; all of them have one shape."""
    batches = workload.work.batches
    flop = workload.useful_flop
    if workload.batch_size * (workload.length or 0) < LONG:
        return workload
    return workload._replace(
        work=Work(batches[:1], []), useful_flop=None if flop is None else flop / len(batches)
    )


def _goals(batch_size: int, length: int) -> Goals:
    if batch_size == 1 and 8 <= length <= 256:
        return Goals(fp32=1.15, int8=1.6, int8_by_int8=1.0)
    if (batch_size, length) == (8, 128):
        return Goals(fp32=1.2, int8=1.8, int8_by_int8=1.0)
    return Goals(fp32=0.97, int8_by_int8=1.0)


def _shape(workload: WorkloadResult) -> tuple[int, int]:
    assert workload.length is not None  # each is of the grid
    return workload.batch_size, workload.length


def markdown(result: Result) -> str:
    """Return a table with one row a shape; a figure that misses its goal says so."""
    lines = [f"| batch x length | {' | '.join(speedups.HEADINGS)} |", "|---|---|---|---|---|"]
    found: list[speedups.Figure] = []
    for workload in sorted(result.workloads, key=_shape):
        batch_size, length = _shape(workload)
        row = speedups.figures(result, workload, _goals(batch_size, length))
        lines.append(f"| {batch_size} x {length} | {' | '.join(map(str, row))} |")
        found += row
    lines += ["", speedups.summary(found)]
    if result.noisy:
        lines += ["", f"Noisy: {'; '.join(result.noisy_because)}."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Speed-ups on full batches of every size and length, where leaving padding out saves nothing.

Every engine keeps the memory of its largest batch: 64 x 512 of MiniLM takes more than 24 GB in a
dozen of them.
"""

from pathlib import Path

import click

from trainkit import tables
from trainkit.bench.engines.registry import Spec, applicable
from trainkit.bench.race import runner
from trainkit.bench.race.protocol import Work
from trainkit.bench.race.workload import Workload, prepare
from trainkit.bench.report.tables import noise
from trainkit.bench.result import BenchmarkSettings, Result, WorkloadResult, check
from trainkit.bench.studies import roofline, speedups
from trainkit.bench.studies.speedups import Goals
from trainkit.bench.studies.study import Session, Study, command_line
from trainkit.data.columns import Columns
from trainkit.data.readers import Example
from trainkit.data.splits import load_split
from trainkit.serve.cores import usable_cores
from trainkit.tables import Table

BATCH_SIZES = (1, 8, 32)
LENGTHS = (1, 8, 32, 128, 512)
TEXTS = 200
LONG = 4096  # tokens, from which one batch per round is enough


@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--name", default="minilm", show_default=True)
@click.option("--batch-size", "batch_sizes", multiple=True, type=int, default=BATCH_SIZES)
@click.option("--length", "lengths", multiple=True, type=int, default=LENGTHS)
@click.option("--min-seconds", default=1.0, show_default=True)
@click.option("--min-rounds", default=5, show_default=True)
def measure(
    session: Session,
    folder: Path,
    data: Path,
    name: str,
    batch_sizes: tuple[int, ...],
    lengths: tuple[int, ...],
    min_seconds: float,
    min_rounds: int,
) -> Result:
    """Race FOLDER/classifier in the others' runtimes, and FOLDER's bundles in ONNX Runtime.

    FOLDER is the suite's, of one model.
    """
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
    workloads = prepare([spec.source for spec in specs], texts, settings)
    return runner.run_on(
        [_shortened(one) for one in workloads if one.length is not None],  # not the texts
        specs,
        settings,
        data=data.name,
        on_progress=session,
        command=command_line(),
        peak_flops={threads: roofline.measure(threads) for threads in settings.threads},
    )


def _shortened(workload: Workload) -> Workload:
    """Keep one of a long workload's batches; all of them have one shape."""
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
    """Return a table with one row per shape; a figure that misses its goal is marked."""
    found: list[speedups.SpeedupCell] = []
    rows = []
    for workload in sorted(result.workloads, key=_shape):
        batch_size, length = _shape(workload)
        row = speedups.figures(result, workload, _goals(batch_size, length))
        rows.append((f"{batch_size} x {length}", *map(str, row)))
        found += row
    notes = filter(None, (speedups.summary(found), noise(result)))
    columns = ("batch x length", *speedups.HEADINGS)
    return tables.markdown(Table(columns, rows, notes=[*notes], numeric=False))


STUDY = Study(
    "grid", Result, measure, markdown, check, file=lambda options: f"grid-{options['name']}"
)

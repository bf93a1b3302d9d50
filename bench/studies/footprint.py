"""What an ONNX bundle costs a service: start, memory, and whether that memory grows.

Fresh processes run up to their first answer, and one long-lived process answers random requests.
"""

import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import click
import msgspec

from trainkit import tables
from trainkit.bench.files import ReportHead
from trainkit.bench.race.worker_process import last_line
from trainkit.bench.studies import cold_start
from trainkit.bench.studies.cold_start import ColdStart
from trainkit.bench.studies.random_requests import SAMPLE_EVERY
from trainkit.bench.studies.study import Session, Study, head
from trainkit.serve.bundle import open_bundle
from trainkit.serve.errors import CheckFailedError, InputError
from trainkit.tables import Table

TEXT = "How far is it from Denver to Aspen ?"
SETTLED = 1000  # requests after which a service has every buffer that it needs
MAX_GROWTH = 0.05


class Goal(NamedTuple):
    """What start and memory of MiniLM should be at most, by precision."""

    start_s: float
    rss_bytes: float


GOALS = {"fp32": Goal(0.35, 150e6), "int8": Goal(0.25, 90e6)}


class BundleFootprint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One bundle: its fresh processes, and the memory of one that serves.

    ``rss_bytes`` after every ``sampled_every`` requests; ``seconds`` are those of all of them.
    """

    precision: str
    external_data: bool  # the weights lie beside the graph, and are mapped
    model_sha256: str
    model_bytes: int
    start: ColdStart
    sampled_every: int
    rss_bytes: tuple[int, ...]
    seconds: float

    @property
    def name(self) -> str:
        """Return what it is called in tables."""
        return self.precision + (", external data" if self.external_data else "")

    @property
    def resident_bytes(self) -> float | None:
        """Return the median of the fresh processes' memory at the first answer."""
        known = [run.rss_bytes for run in self.start.runs if run.rss_bytes is not None]
        return statistics.median(known) if known else None

    @property
    def growth(self) -> float:
        """Return by what share memory rises at most above that after the settling requests."""
        settled = SETTLED // self.sampled_every
        return max(self.rss_bytes[settled:]) / self.rss_bytes[settled - 1] - 1


class Footprint(ReportHead, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The footprints of some bundles."""

    schema: Literal["trainkit-footprint/2"] = "trainkit-footprint/2"
    requests: int
    measured: tuple[BundleFootprint, ...]


class _Served(msgspec.Struct):
    rss_bytes: tuple[int, ...]
    seconds: float


@click.argument("bundles", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--runs", default=15, show_default=True, help="Fresh processes of each bundle.")
@click.option("--requests", "count", default=10_000, show_default=True)
def measure(session: Session, bundles: tuple[Path, ...], runs: int, count: int) -> Footprint:
    """Measure start and memory of BUNDLES."""
    if count < SETTLED + SAMPLE_EVERY:
        raise InputError(f"--requests must be at least {SETTLED + SAMPLE_EVERY}, not {count}.")
    measured = []
    for bundle in bundles:
        session(str(bundle))
        measured.append(measure_bundle(bundle, runs, count))
    return Footprint(**head(), requests=count, measured=tuple(measured))


def measure_bundle(bundle: Path, runs: int, count: int) -> BundleFootprint:
    """Start ``bundle`` in ``runs`` processes, then send ``count`` requests to another."""
    start = cold_start.measure(bundle, TEXT, runs)
    program = [sys.executable, "-P", "-m", "trainkit.bench.studies.random_requests"]
    ended = subprocess.run([*program, bundle, str(count)], capture_output=True, check=False)
    if ended.returncode:
        reason = last_line(ended.stderr.decode(errors="replace"))
        raise CheckFailedError(f"serving {bundle} ended with status {ended.returncode}: {reason}")
    served = msgspec.json.decode(ended.stdout, type=_Served)
    opened = open_bundle(bundle)
    files = opened.model_files
    return BundleFootprint(
        precision=opened.manifest.precision,
        external_data=len(files) > 1,
        model_sha256=files[opened.model_path.name].sha256,
        model_bytes=sum(facts.size_bytes for facts in files.values()),
        start=start,
        sampled_every=SAMPLE_EVERY,
        rss_bytes=served.rss_bytes,
        seconds=served.seconds,
    )


def check(footprint: Footprint) -> None:
    """Raise ``CheckFailedError`` if memory grows after the settling requests, by over 5%."""
    faults = [
        f"{one.name} by {100 * one.growth:.1f}%"
        for one in footprint.measured
        if one.growth > MAX_GROWTH
    ]
    if faults:
        raise CheckFailedError(
            f"after {SETTLED:,} requests memory may grow by {100 * MAX_GROWTH:.0f}%, and it grew: "
            f"{', '.join(faults)}. Look at the samples for what is never given back."
        )


def markdown(footprint: Footprint) -> str:
    """Lay the figures out as a table, each beside its goal."""
    columns = (
        "",
        "start to first answer",
        "goal",
        "resident then",
        "goal",
        "at its peak before",
        f"resident after {SETTLED:,} requests",
        "at most after that",
        "growth",
        "goal",
    )
    rows = [tuple(_cells(one)) for one in footprint.measured]
    return tables.markdown(Table(columns, rows, notes=[_note(footprint)]))


def _cells(one: BundleFootprint) -> Iterator[str]:
    goal = GOALS.get(one.precision)
    settled = SETTLED // one.sampled_every
    yield from (one.name, f"{one.start.median_s:.2f} s", f"{goal.start_s} s" if goal else "-")
    yield from (_megabytes(one.resident_bytes), _megabytes(goal.rss_bytes if goal else None))
    yield _megabytes(one.start.peak_rss_bytes)
    yield _megabytes(one.rss_bytes[settled - 1])
    yield _megabytes(max(one.rss_bytes[settled:]))
    yield from (f"{100 * one.growth:+.1f}%", f"{100 * MAX_GROWTH:.0f}%")


def _megabytes(size_bytes: float | None) -> str:
    return "-" if size_bytes is None else f"{size_bytes / 1e6:.0f} MB"


def _note(footprint: Footprint) -> str:
    here = footprint.environment
    sizes = {one.precision: one.model_bytes for one in footprint.measured}
    files = " and ".join(f"{size / 1e6:.0f} MB ({name})" for name, size in sizes.items())
    return (
        f"The median of {len(footprint.measured[0].start.runs)} fresh processes; "
        f"{footprint.requests:,} requests. Model files of {files}. {here.processor}, {here.cores} "
        f"cores, ONNX Runtime {here.versions['onnxruntime']}."
    )


STUDY = Study("footprint", Footprint, measure, markdown, check)

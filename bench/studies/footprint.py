"""What an ONNX bundle costs a service: its start, its memory, and whether that memory grows.

``python -m trainkit.bench.studies footprint BUNDLE...`` starts fresh processes up to their first
answer, and sends random requests to one that lives on, whose resident memory it samples. Writes
``bench/results/footprint.json``; it fails where that memory grows after the first requests. Goals
of start and memory are told beside the figures.
"""

import statistics
import subprocess
import sys
from pathlib import Path
from typing import Literal, NamedTuple

import click
import msgspec

from trainkit.bench.measure.environment import Environment, describe
from trainkit.bench.race.worker_process import last_line
from trainkit.bench.studies import cold_start
from trainkit.bench.studies.cold_start import ColdStart
from trainkit.bench.studies.random_requests import SAMPLE_EVERY
from trainkit.cli_errors import ErrorReportingCommand
from trainkit.serve.bundle import open_bundle
from trainkit.serve.errors import CheckFailedError, InputError
from trainkit.serve.files import pretty_json, write_atomically

__all__ = ["Footprint", "Measured", "check", "load", "main", "markdown"]

RESULTS = Path("bench/results/footprint.json")
TEXT = "How far is it from Denver to Aspen ?"
SETTLED = 1000  # requests after which a service has every buffer that it needs
MAX_GROWTH = 0.05


class Goal(NamedTuple):
    """What start and memory of MiniLM should be at most, by precision."""

    start_s: float
    rss_bytes: float


GOALS = {"fp32": Goal(0.35, 150e6), "int8": Goal(0.25, 90e6)}


class Measured(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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


class Footprint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of ``footprint.json``."""

    schema: Literal["trainkit-footprint/1"] = "trainkit-footprint/1"
    command: tuple[str, ...]
    environment: Environment
    requests: int
    measured: tuple[Measured, ...]


class _Served(msgspec.Struct):
    rss_bytes: tuple[int, ...]
    seconds: float


@click.command(cls=ErrorReportingCommand)
@click.argument("bundles", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--runs", default=15, show_default=True, help="Fresh processes of each bundle.")
@click.option("--requests", "count", default=10_000, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(bundles: tuple[Path, ...], runs: int, count: int, out: Path) -> None:
    """Measure start and memory of BUNDLES."""
    if count < SETTLED + SAMPLE_EVERY:
        raise InputError(f"--requests must be at least {SETTLED + SAMPLE_EVERY}, not {count}.")
    environment = describe()
    footprint = Footprint(
        command=("python", "-m", "trainkit.bench.studies.footprint", *sys.argv[1:]),
        environment=environment,
        requests=count,
        measured=tuple(measure(bundle, runs, count) for bundle in bundles),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, pretty_json(footprint))
    click.echo(markdown(footprint))
    check(footprint)


def measure(bundle: Path, runs: int, count: int) -> Measured:
    """Start ``bundle`` so many times, then send so many requests to one process of its own."""
    start = cold_start.measure(bundle, TEXT, runs)
    command = [
        sys.executable,
        "-P",
        "-m",
        "trainkit.bench.studies.random_requests",
        str(bundle),
        str(count),
    ]
    ended = subprocess.run(command, capture_output=True, check=False)
    if ended.returncode:
        said = last_line(ended.stderr.decode(errors="replace"))
        raise CheckFailedError(f"serving {bundle} ended with status {ended.returncode}: {said}")
    served = msgspec.json.decode(ended.stdout, type=_Served)
    opened = open_bundle(bundle)
    files = opened.model_files
    return Measured(
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
    """Raise ``CheckFailedError`` where memory grows after the settling requests, by over 5 %."""
    faults = [
        f"{one.name} by {100 * one.growth:.1f} %"
        for one in footprint.measured
        if one.growth > MAX_GROWTH
    ]
    if faults:
        raise CheckFailedError(
            f"after {SETTLED:,} requests memory may grow by {100 * MAX_GROWTH:.0f} %, and it grew: "
            f"{', '.join(faults)}. Look at the samples for what is never given back."
        )


def load(path: Path = RESULTS) -> Footprint:
    """Read ``footprint.json``."""
    return msgspec.json.decode(path.read_bytes(), type=Footprint)


def markdown(footprint: Footprint) -> str:
    """Lay the figures out as a table, each beside its goal."""
    lines = [
        "| | start to first answer | goal | resident then | goal | at its peak before | "
        f"resident after {SETTLED:,} requests | at most after that | growth | goal |",
        "|---|" + "---:|" * 9,
    ]
    lines += [_row(one) for one in footprint.measured]
    return "\n".join([*lines, "", _note(footprint)])


def _row(one: Measured) -> str:
    goal = GOALS.get(one.precision)
    start_s, most_bytes = (f"{goal.start_s} s", _megabytes(goal.rss_bytes)) if goal else ("-", "-")
    settled = SETTLED // one.sampled_every
    cells = (
        one.name,
        f"{one.start.median_s:.2f} s",
        start_s,
        _megabytes(one.resident_bytes),
        most_bytes,
        _megabytes(one.start.peak_rss_bytes),
        _megabytes(one.rss_bytes[settled - 1]),
        _megabytes(max(one.rss_bytes[settled:])),
        f"{100 * one.growth:+.1f} %",
        f"{100 * MAX_GROWTH:.0f} %",
    )
    return f"| {' | '.join(cells)} |"


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


if __name__ == "__main__":
    main()

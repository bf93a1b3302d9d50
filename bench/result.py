"""The report of a benchmark: JSON is the source of truth, and every table is drawn from it.

docs/bench.md describes the fields; ``schema`` changes whenever they do.
"""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec
import numpy as np

from trainkit.bench import files
from trainkit.bench.measure.environment import Environment
from trainkit.bench.measure.roofline import Roofline
from trainkit.bench.measure.statistics import bootstrap_interval
from trainkit.export.parity import Report
from trainkit.serve.errors import CheckFailedError, InputError

__all__ = [
    "Absent",
    "Engine",
    "Measurement",
    "Ratio",
    "Result",
    "Scenario",
    "Settings",
    "Turn",
    "WarmUp",
    "WorkloadResult",
    "check",
    "load",
    "save",
    "texts_per_s",
]

Scenario: TypeAlias = Literal["offline", "single-stream", "server", "grid"]
"""MLPerf Inference's scenarios (Reddi et al. 2020), and full batches of one length.

offline: batches of texts, one after the other. single-stream: one text after the other. server:
single texts that arrive by a Poisson process, latency from the moment that each was due.
"""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to measure.

    Each engine is measured with each number of ``threads``. A workload ends when every engine has
    run for ``min_seconds`` and in ``min_rounds`` rounds; a warm-up takes ``warm_up_max_seconds`` an
    engine at most, but always one pass. ``rates`` are requests a second of the server scenario.
    """

    batch_sizes: tuple[int, ...] = (32,)
    lengths: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    single_stream: bool = False
    threads: tuple[int, ...]
    min_seconds: float = 10.0
    min_rounds: int = 20
    warm_up_max_seconds: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        faults = [
            f"{name} must be at least 1, not {value}"
            for name in ("batch_sizes", "lengths", "threads", "min_rounds")
            for value in _values(getattr(self, name))
            if value < 1
        ]
        faults += [f"rates must be above 0, not {rate:g}" for rate in self.rates if not rate > 0]
        faults += [
            f"{name} must be 0 or more, not {value}"
            for name in ("min_seconds", "warm_up_max_seconds")
            if not (value := getattr(self, name)) >= 0
        ]
        if not self.threads:
            faults.append("threads must name at least one number")
        if faults:
            raise InputError("These benchmark settings do not work: " + "; ".join(faults) + ".")


def _values(setting: int | tuple[int, ...]) -> tuple[int, ...]:
    return setting if isinstance(setting, tuple) else (setting,)


class Engine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured: a runtime on a source, with so many threads.

    ``name`` is what a reader calls it, as "ONNX Runtime int8"; ``runtime`` and ``source`` are what
    the command line calls it. ``load_s`` is from the process's start to the open model,
    ``cold_start_s`` to the first answer. ``peak_rss_bytes`` is the whole process's, at the end.
    ``file_bytes`` counts the files of the source's folder, not those in folders below.
    ``tokenises`` says that its times hold the texts' encoding, as in ``transformers``' pipeline.
    ``model_sha256`` is that of a bundle's model file.
    """

    name: str
    runtime: str
    source: str
    precision: str
    threads: int
    load_s: float
    cold_start_s: float
    peak_rss_bytes: int | None
    file_bytes: int
    tokenises: bool = False
    versions: dict[str, str] = {}
    model_sha256: str | None = None


class Absent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A runtime that was asked for and is not there, and why."""

    runtime: str
    source: str
    reason: str


class Ratio(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many texts an engine does while the baseline does one: above 1 is faster.

    The median over rounds of the two rates of one round, and its 95 % bootstrap interval.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of_rounds(cls, rates: Sequence[float], baseline: Sequence[float]) -> "Ratio":
        """Compare two rates a round; of durations, give the baseline's first."""
        ratios = [rate / base for rate, base in zip(rates, baseline, strict=True)]
        return cls(float(np.median(ratios)), *bootstrap_interval(ratios))


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Passes over all batches: the seconds of every batch, one tuple a pass.

    Wall time of the call, or, where batches arrive by a schedule, from when each was due to its
    end. ``seconds`` are the wall seconds of the passes, ``cpu_s`` their CPU seconds over all
    threads.
    """

    batch_s: tuple[tuple[float, ...], ...]
    seconds: float
    cpu_s: float


class WarmUp(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The turn before the measurement, and whether its passes had become equally fast."""

    turn: Turn
    stable: bool


class Measurement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine on one workload: what it did, and the raw turns it was computed from.

    ``engine`` is its place among the result's engines. ``texts_per_s`` is the median over rounds,
    without tokenisation. Percentiles are of a batch's wall time in milliseconds, in the server
    scenario of a request's time since it was due; None where the sample does not carry them.
    ``ratio`` and ``outputs`` are against the workload's first engine, and None for it. ``accuracy``
    is the share of right labels where labels were given. ``cores_used`` is CPU time by wall time;
    ``roofline_share`` is useful operations a second by the machine's measured peak.
    """

    engine: int
    texts_per_s: float
    p50_ms: float | None
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    ratio: Ratio | None
    outputs: Report | None
    wrong: bool
    accuracy: float | None
    cores_used: float
    roofline_share: float | None
    warm_up: WarmUp
    rounds: tuple[Turn, ...]


class WorkloadResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was computed, and how fast each engine did; the first measurement is the baseline.

    ``length`` is that of a grid's batches, ``rate`` the server scenario's requests a second.
    ``padding_share`` is that of all positions; ``tokenisation_s`` holds each measured encoding of
    all texts. ``useful_flop`` are the floating-point operations for one pass without padding, None
    where the architecture does not tell. ``absent`` are engines that cannot do this workload.
    """

    name: str
    scenario: Scenario
    batch_size: int
    length: int | None
    rate: float | None
    texts: int
    batches: int
    tokens: int
    padding_share: float
    tokenisation_s: tuple[float, ...]
    useful_flop: float | None
    measurements: tuple[Measurement, ...]
    absent: tuple[Absent, ...] = ()


class Result(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole benchmark.

    Where ``noisy``, ``noisy_because`` says why the timings deserve less trust.
    """

    schema: Literal["trainkit-bench/2"] = "trainkit-bench/2"
    command: tuple[str, ...]
    date: datetime
    data: str
    settings: Settings
    environment_before: Environment
    environment_after: Environment
    roofline: Roofline | None
    noisy: bool
    noisy_because: tuple[str, ...]
    engines: tuple[Engine, ...]
    absent: tuple[Absent, ...]
    workloads: tuple[WorkloadResult, ...]


def texts_per_s(rounds: Sequence[Turn], texts: int) -> list[float]:
    """Return one rate a round, of rounds whose every pass has so many texts."""
    return [texts * len(turn.batch_s) / turn.seconds for turn in rounds]


def check(result: Result) -> None:
    """Raise ``CheckFailedError`` where an engine computed something else than the baseline."""
    wrong: dict[str, str] = {}
    for workload in result.workloads:
        for measurement in workload.measurements:
            if measurement.wrong and measurement.outputs:
                engine = result.engines[measurement.engine]
                said = f"{measurement.outputs.why} ({workload.name})"
                wrong.setdefault(f"{engine.name} ({engine.source})", said)
    if wrong:
        baseline = result.engines[0]
        reasons = "; ".join(f"{name}: {reason}" for name, reason in wrong.items())
        raise CheckFailedError(
            f"not the outputs of {baseline.name} ({baseline.source}): {reasons}. "
            "The speed of a wrong engine means nothing; look at it with: trainkit verify"
        )


def save(result: Result, path: Path) -> None:
    """Write the report as JSON; never half of it."""
    files.write(path, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")


def load(path: Path) -> Result:
    """Read what :func:`save` wrote; ``InputError`` where it is something else."""
    return files.read(path, Result, "trainkit bench run")

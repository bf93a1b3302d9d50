"""The result of a benchmark, as a JSON file; every table and plot is drawn from it.

docs/bench.md describes the fields; ``schema`` changes whenever they do.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec
import numpy as np

from trainkit.bench import files
from trainkit.bench.measure.environment import Environment
from trainkit.bench.measure.statistics import Interval, Ratio
from trainkit.export.parity import ParityReport
from trainkit.serve.errors import CheckFailedError, InputError

Scenario: TypeAlias = Literal["offline", "single-stream", "server", "grid"]
"""MLPerf Inference's scenarios (Reddi et al. 2020), and full batches of one length.

offline: batches of texts, one after the other. single-stream: one text after the other. server:
single texts that arrive by a Poisson process, with latency counted from when each was due.
"""


class BenchmarkSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to measure.

    Each engine is measured with each number of ``threads``. A workload ends when every engine has
    run for ``min_seconds`` and in ``min_rounds`` rounds. A warm-up takes at most
    ``warm_up_max_seconds`` per engine, but always one pass. ``rates`` are requests/s of the server
    scenario.
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


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured: a runtime on a source, with a number of threads.

    ``name`` is the title for readers, as "ONNX Runtime int8"; ``runtime`` and ``source`` are the
    command line's. ``load_s`` is from the process's start to the open model, ``cold_start_s`` to
    the first answer. ``peak_rss_bytes`` is the whole process's, at the end. ``file_bytes`` counts
    the files of the source's folder, not those of its subfolders. If ``includes_tokenization``, its
    times contain the encoding of the texts, as in transformers' pipeline. ``model_sha256`` is that
    of a bundle's model file.
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
    includes_tokenization: bool = False
    versions: dict[str, str] = {}
    model_sha256: str | None = None


class Unavailable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A requested runtime that could not be measured, and the reason."""

    runtime: str
    source: str
    reason: str


class Round(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One engine's turn in one round: a JSON array ``[seconds, cpu_s, batches, median_s]``.

    ``seconds`` is wall time, ``cpu_s`` the CPU time of all threads, ``batches`` the number of
    batches that ran (in the server scenario, of requests) and ``median_s`` their median latency.
    """

    seconds: float
    cpu_s: float
    batches: int
    median_s: float


class Measurement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine on one workload.

    ``engine`` is an index into the result's engines. ``texts_per_s`` is the median over rounds,
    without tokenization. Percentiles are of a batch's wall time in milliseconds, in the server
    scenario of a request's time since it was due; None if the sample is too small. There
    ``p50_interval_ms`` and ``p99_interval_ms`` are 95% intervals from resampled rounds. ``ratio``
    and ``outputs`` compare with the workload's first engine, and are None for it; ``outputs`` names
    cases only if one failed. ``accuracy`` is the share of correct labels, if labels were given.
    ``cores_used`` is CPU time divided by wall time; ``roofline_share`` is useful operations per
    second divided by the machine's measured peak.
    """

    engine: int
    texts_per_s: float
    p50_ms: float | None
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    p50_interval_ms: Interval | None = None
    p99_interval_ms: Interval | None = None
    ratio: Ratio | None
    outputs: ParityReport | None
    wrong: bool
    accuracy: float | None
    cores_used: float
    roofline_share: float | None
    warm_up_s: float
    warm_up_stable: bool
    rounds: tuple[Round, ...]


class WorkloadResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was computed, and how fast each engine was; the first measurement is the baseline.

    ``length`` is that of a grid's batches, ``rate`` the server scenario's requests/s.
    ``padding_share`` is a share of all positions; ``tokenisation_s`` holds each timed encoding of
    all texts. ``useful_flop`` is the number of floating-point operations of one pass without
    padding, or None for an unknown architecture. ``unavailable`` lists engines that cannot run this
    workload.
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
    unavailable: tuple[Unavailable, ...] = ()

    def texts_per_s(self, rounds: Sequence[Round]) -> list[float]:
        """Return the throughput of each round."""
        if self.rate is not None:
            return [one.batches / one.seconds for one in rounds]
        return [self.texts * (one.batches // self.batches) / one.seconds for one in rounds]

    def speeds(self, measured: Measurement) -> list[float]:
        """Return one speed per round: texts/s, or in the server scenario 1 / median latency."""
        if self.rate is not None:
            return [1 / one.median_s for one in measured.rounds]
        return self.texts_per_s(measured.rounds)


class Result(files.ReportHead, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole benchmark; ``environment`` is the machine before it began.

    ``peak_flops`` is the machine's peak in operations/s, by number of threads, if it was measured.
    """

    schema: Literal["trainkit-bench/3"] = "trainkit-bench/3"
    data: str
    settings: BenchmarkSettings
    environment_after: Environment
    peak_flops: dict[int, float] = msgspec.field(default_factory=dict)
    engines: tuple[EngineInfo, ...]
    unavailable: tuple[Unavailable, ...]
    workloads: tuple[WorkloadResult, ...]


def check(result: Result) -> None:
    """Raise ``CheckFailedError`` if an engine's outputs differ from the baseline's."""
    wrong: dict[str, str] = {}
    for workload in result.workloads:
        for measurement in workload.measurements:
            if measurement.wrong and measurement.outputs:
                engine = result.engines[measurement.engine]
                why = f"{measurement.outputs.why} ({workload.name})"
                wrong.setdefault(f"{engine.name} ({engine.source})", why)
    if wrong:
        baseline = result.engines[0]
        reasons = "; ".join(f"{name}: {reason}" for name, reason in wrong.items())
        raise CheckFailedError(
            f"not the outputs of {baseline.name} ({baseline.source}): {reasons}. "
            "The speed of a wrong engine means nothing; look at it with: trainkit verify"
        )


def save(result: Result, path: Path) -> None:
    """Write the result as JSON, with one line for each measurement."""
    files.write(path, files.json_lines(result))


def load(path: Path) -> Result:
    """Read what :func:`save` wrote; raises ``InputError`` if the file is something else."""
    return files.read(path, Result, "trainkit bench run")


def summarize(batch_s: Sequence[Sequence[float]], seconds: float, cpu_s: float) -> Round:
    """Summarize a turn, given the seconds of each batch in each pass."""
    times = [s for one_pass in batch_s for s in one_pass]
    # Clocks are no finer than this, and more digits would double the file.
    return Round(round(seconds, 7), round(cpu_s, 6), len(times), round(float(np.median(times)), 8))


def percentile_intervals(
    p50_ms: float | None, p99_ms: float | None, rounds: Sequence[Sequence[Sequence[float]]]
) -> dict[str, Interval | None]:
    """Return the 95% intervals of p50 and p99, from resamples of whole rounds of latencies."""
    times = [1000 * np.concatenate([np.array(one) for one in passes]) for passes in rounds]

    def interval(of_all: float | None, percent: int) -> Interval | None:
        if of_all is None:
            return None
        drawn = np.random.default_rng(0).integers(len(times), size=(RESAMPLES, len(times)))
        found = [np.percentile(np.concatenate([times[i] for i in row]), percent) for row in drawn]
        low, high = np.quantile(found, [0.025, 0.975])
        return Interval(min(float(low), of_all), max(float(high), of_all))

    return {"p50_interval_ms": interval(p50_ms, 50), "p99_interval_ms": interval(p99_ms, 99)}


RESAMPLES = 400


def without_examples(outputs: ParityReport) -> ParityReport:
    """Return a parity report without its examples, but for the case that explains a failure."""
    return msgspec.structs.replace(
        outputs, worst=outputs.worst[:1] if outputs.failed else (), worst_row=None
    )

"""Summaries of a race: turns become the rates, percentiles and ratios of a result.

Ratios are against the first engine of a workload, inside each round; outputs are compared with
those of the same engine.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from trainkit.bench.measure.environment import Environment
from trainkit.bench.measure.statistics import Ratio, percentile, spread
from trainkit.bench.race.protocol import Turn
from trainkit.bench.race.worker_process import WorkerProcess
from trainkit.bench.race.workload import Workload
from trainkit.bench.result import (
    EngineInfo,
    Measurement,
    Unavailable,
    WorkloadResult,
    percentile_intervals,
    summarize,
    without_examples,
)
from trainkit.export import parity, parity_cases
from trainkit.serve.types import FloatArray, Runner

NOISY_SPREAD = 0.15
NOISY_LOAD_SHARE = 0.5
SAME = 1e-3  # equal rows have equal logits up to rounding


class OpenEngine(NamedTuple):
    """A worker with an open engine; ``number`` is its index in the result."""

    worker: WorkerProcess
    number: int
    info: EngineInfo


class EngineRun(NamedTuple):
    """One engine's turns and logits on one workload."""

    engine: OpenEngine
    warm_up: Turn
    stable: bool
    logits: list[FloatArray]
    turns: list[Turn]


def logit_std(baselines: Sequence[EngineRun]) -> float:
    """Return the standard deviation of the logits of all workloads."""
    return parity.logit_std(np.concatenate([one for run in baselines for one in run.logits]))


def result_of(
    workload: Workload,
    runs: Sequence[EngineRun],
    unavailable: Sequence[Unavailable],
    peak_flops: Mapping[int, float],
    logits_std: float,
) -> WorkloadResult:
    """Summarize one workload; the first of ``runs`` is the baseline."""
    result = WorkloadResult(
        name=workload.name,
        scenario=workload.scenario,
        batch_size=workload.batch_size,
        length=workload.length,
        rate=workload.rate,
        texts=workload.texts,
        batches=len(workload.work.batches),
        tokens=workload.tokens,
        padding_share=workload.padding_share,
        tokenisation_s=workload.tokenisation_s,
        useful_flop=workload.useful_flop,
        measurements=(),
        unavailable=tuple(unavailable),
    )
    # Full batches of one token repeat the same row, so that their logits have no deviation.
    own = parity.logit_std(np.concatenate(runs[0].logits))
    noise_against = own if own > SAME * logits_std else logits_std
    named = ((f"batch {n}", batch) for n, batch in enumerate(workload.work.batches, start=1))
    cases = parity_cases.run_reference(_replay(runs[0].logits), named)
    baseline = _texts_per_s(result, runs[0])
    measurements = []
    for run in runs:
        outputs = ratio = None
        if run is not runs[0]:
            outputs = parity.compare(
                cases, _replay(run.logits), run.engine.info.precision, noise_against=noise_against
            )
            ratio = Ratio.of_rounds(_texts_per_s(result, run), baseline)
        share = _roofline_share(result, run, peak_flops)
        accuracy = _accuracy(run.logits, workload.expected)
        measurements.append(_measurement(result, run, ratio, outputs, share, accuracy))
    return msgspec.structs.replace(result, measurements=tuple(measurements))


def _replay(logits: Sequence[FloatArray]) -> Runner:
    """Return a runner that yields recorded logits, batch by batch."""
    recorded = iter(logits)
    return lambda batch: next(recorded)


def _texts_per_s(workload: WorkloadResult, run: EngineRun) -> list[float]:
    return workload.texts_per_s([summarize(*msgspec.structs.astuple(one)) for one in run.turns])


def _roofline_share(
    workload: WorkloadResult, run: EngineRun, peak_flops: Mapping[int, float]
) -> float | None:
    peak = peak_flops.get(run.engine.info.threads)
    if peak is None or workload.useful_flop is None:
        return None
    rate = float(np.median(_texts_per_s(workload, run)))
    return workload.useful_flop / workload.texts * rate / peak


def _accuracy(logits: Sequence[FloatArray], expected: Sequence[int] | None) -> float | None:
    if expected is None:
        return None
    return float(np.mean(np.concatenate(logits).argmax(axis=1) == np.asarray(expected)))


def _measurement(
    workload: WorkloadResult,
    run: EngineRun,
    ratio: Ratio | None,
    outputs: parity.ParityReport | None,
    roofline_share: float | None,
    accuracy: float | None,
) -> Measurement:
    passes = [turn.batch_s for turn in run.turns]
    batch_ms = [1000 * s for turn in passes for one_pass in turn for s in one_pass]
    p50_ms, p90_ms, p95_ms, p99_ms = (percentile(batch_ms, percent) for percent in (50, 90, 95, 99))
    intervals = percentile_intervals(p50_ms, p99_ms, passes) if workload.rate is not None else {}
    return Measurement(
        engine=run.engine.number,
        texts_per_s=float(np.median(_texts_per_s(workload, run))),
        p50_ms=p50_ms,
        p90_ms=p90_ms,
        p95_ms=p95_ms,
        p99_ms=p99_ms,
        **intervals,
        ratio=ratio,
        outputs=None if outputs is None else without_examples(outputs),
        wrong=outputs is not None and not outputs.passed,
        accuracy=accuracy,
        cores_used=sum(one.cpu_s for one in run.turns) / sum(one.seconds for one in run.turns),
        roofline_share=roofline_share,
        warm_up_s=run.warm_up.seconds,
        warm_up_stable=run.stable,
        rounds=tuple(summarize(*msgspec.structs.astuple(one)) for one in run.turns),
    )


def finished(engine: OpenEngine, runs: Sequence[EngineRun]) -> EngineInfo:
    """Return an engine's facts with those known only at the end: first answer and peak memory."""
    first = next((run.warm_up.batch_s[0][0] for run in runs if run.engine is engine), 0.0)
    return msgspec.structs.replace(
        engine.info,
        cold_start_s=engine.info.load_s + first,
        peak_rss_bytes=engine.worker.peak_rss_bytes,
    )


def noise_of(
    results: Sequence[WorkloadResult], engines: Sequence[EngineInfo], before: Environment
) -> tuple[str, ...]:
    """Return the reasons to trust these timings less; none on a quiet machine."""
    reasons = []
    load = before.load_average[0]
    if load > NOISY_LOAD_SHARE * before.cores:
        reasons.append(f"the load average was {load:.1f} on {before.cores} cores before it began")
    for result in results:
        baseline = result.measurements[0]
        variation = spread([one.batches / one.seconds for one in baseline.rounds])
        # In the server scenario random arrivals alone make rounds unequal.
        if variation > NOISY_SPREAD and result.rate is None:
            reasons.append(
                f"the middle half of {engines[baseline.engine].name}'s rounds on '{result.name}' "
                f"spreads over {100 * variation:.0f}% of their median"
            )
        reasons += [
            f"{engines[measurement.engine].name} was not yet steady on '{result.name}' after "
            f"{measurement.warm_up_s:.1f} s of warm-up"
            for measurement in result.measurements
            if not measurement.warm_up_stable
        ]
    return tuple(reasons)

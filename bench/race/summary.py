"""What a race came to: the turns that were measured, made into the structs of a result.

In go the engines, what each did on a workload, and the machine's peak; out come rates, percentiles,
ratios to the first engine inside a round, outputs compared with its own, and the reasons to trust
all of it less.
"""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from trainkit.bench.measure.environment import Environment
from trainkit.bench.measure.roofline import Roofline
from trainkit.bench.measure.statistics import percentile, spread
from trainkit.bench.race.protocol import Measured
from trainkit.bench.race.worker_process import WorkerProcess
from trainkit.bench.race.workload import Workload
from trainkit.bench.result import (
    Absent,
    Engine,
    Measurement,
    Ratio,
    Turn,
    WarmUp,
    WorkloadResult,
    texts_per_s,
)
from trainkit.export import parity, parity_cases
from trainkit.serve.types import FloatArray, Runner

__all__ = ["Raced", "Running", "noise_of", "result_of", "spread_of", "with_end"]

NOISY_SPREAD = 0.15
NOISY_LOAD_SHARE = 0.5
SAME = 1e-3  # rows that are the same come out the same, but for the last digits


class Running(NamedTuple):
    """A worker with an open engine; ``place`` is its place in the result."""

    worker: WorkerProcess
    place: int
    about: Engine


class Raced(NamedTuple):
    """What one engine did on one workload so far."""

    engine: Running
    warm_up: WarmUp
    logits: list[FloatArray]
    rounds: list[Measured]


def spread_of(baselines: Sequence[Raced]) -> float:
    """Return the spread of all workloads' logits."""
    return parity.logit_std(np.concatenate([one for raced in baselines for one in raced.logits]))


def result_of(
    workload: Workload,
    able: Sequence[Raced],
    absent: Sequence[Absent],
    roof: Roofline | None,
    logits_spread: float,
) -> WorkloadResult:
    """Return what the engines came to on one workload; the first of ``able`` is the baseline."""
    return WorkloadResult(
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
        measurements=tuple(_measurements(able, workload, roof, logits_spread)),
        absent=tuple(absent),
    )


def _measurements(
    engines: Sequence[Raced], workload: Workload, roof: Roofline | None, logits_spread: float
) -> list[Measurement]:
    # Full batches of one token are the same row over and over, and have no spread of their own.
    own = parity.logit_std(np.concatenate(engines[0].logits))
    against = own if own > SAME * logits_spread else logits_spread
    named = ((f"batch {n}", batch) for n, batch in enumerate(workload.work.batches, start=1))
    cases = parity_cases.run_reference(_replay(engines[0].logits), named)
    baseline = _texts_per_s(engines[0], workload)
    found = []
    for engine in engines:
        outputs = ratio = None
        if engine is not engines[0]:
            precision = engine.engine.about.precision
            outputs = parity.compare(
                cases, _replay(engine.logits), precision, noise_against=against
            )
            ratio = Ratio.of_rounds(_texts_per_s(engine, workload), baseline)
        found.append(_measurement(engine, workload, roof, ratio, outputs))
    return found


def _replay(logits: Sequence[FloatArray]) -> Runner:
    """Give the outputs that a worker wrote, batch by batch, to the one parity checker."""
    recorded = iter(logits)
    return lambda batch: next(recorded)


def _texts_per_s(engine: Raced, workload: Workload) -> list[float]:
    """Return one rate a round."""
    turns = [measured.turn for measured in engine.rounds]
    if workload.rate is not None:
        return [len(turn.batch_s[0]) / turn.seconds for turn in turns]
    return texts_per_s(turns, workload.texts)


def _measurement(
    engine: Raced,
    workload: Workload,
    roof: Roofline | None,
    ratio: Ratio | None,
    outputs: parity.Report | None,
) -> Measurement:
    turns: tuple[Turn, ...] = tuple(measured.turn for measured in engine.rounds)
    batch_ms = [1000 * s for turn in turns for one_pass in turn.batch_s for s in one_pass]
    rate = float(np.median(_texts_per_s(engine, workload)))
    share = None
    if roof is not None and workload.useful_flop is not None:
        flop_per_s = workload.useful_flop / workload.texts * rate
        share = flop_per_s / roof.peak(engine.engine.about.threads)
    return Measurement(
        engine=engine.engine.place,
        texts_per_s=rate,
        p50_ms=percentile(batch_ms, 50),
        p90_ms=percentile(batch_ms, 90),
        p95_ms=percentile(batch_ms, 95),
        p99_ms=percentile(batch_ms, 99),
        ratio=ratio,
        outputs=outputs,
        wrong=outputs is not None and not outputs.passed,
        accuracy=_accuracy(engine.logits, workload.expected),
        cores_used=sum(turn.cpu_s for turn in turns) / sum(turn.seconds for turn in turns),
        roofline_share=share,
        warm_up=engine.warm_up,
        rounds=turns,
    )


def _accuracy(logits: Sequence[FloatArray], expected: Sequence[int] | None) -> float | None:
    if expected is None:
        return None
    return float(np.mean(np.concatenate(logits).argmax(axis=1) == np.asarray(expected)))


def with_end(engine: Running, results: Sequence[WorkloadResult]) -> Engine:
    """Add what is known only now: the first answer, and the most memory."""
    mine = [
        measurement
        for result in results
        for measurement in result.measurements
        if measurement.engine == engine.place
    ]
    first = mine[0].warm_up.turn.batch_s[0][0] if mine else 0.0
    return msgspec.structs.replace(
        engine.about,
        cold_start_s=engine.about.load_s + first,
        peak_rss_bytes=engine.worker.peak_rss_bytes,
    )


def noise_of(
    results: Sequence[WorkloadResult], engines: Sequence[Engine], before: Environment
) -> tuple[str, ...]:
    """Return the reasons to trust these timings less; none on a quiet machine."""
    reasons = []
    load = before.load_average[0]
    if load > NOISY_LOAD_SHARE * before.cores:
        reasons.append(f"the load average was {load:.1f} on {before.cores} cores before it began")
    for result in results:
        baseline = result.measurements[0]
        variation = spread([len(turn.batch_s) / turn.seconds for turn in baseline.rounds])
        # Arrivals by chance make rounds of the server scenario unequal by themselves.
        if variation > NOISY_SPREAD and result.rate is None:
            reasons.append(
                f"the middle half of {engines[baseline.engine].name}'s rounds on '{result.name}' "
                f"spreads over {100 * variation:.0f} % of their median"
            )
        reasons += [
            f"{engines[measurement.engine].name} was not yet steady on '{result.name}' after "
            f"{measurement.warm_up.turn.seconds:.1f} s of warm-up"
            for measurement in result.measurements
            if not measurement.warm_up.stable
        ]
    return tuple(reasons)

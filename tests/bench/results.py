"""Benchmark results of the real shape, from engines whose true speed is known.

An engine takes ``call_ms + token_us * positions`` for a batch, times noise that is the same for all
batches of a round (what else the machine does) and noise of each batch.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any, NamedTuple

import msgspec
import numpy as np

from trainkit.bench.measure import environment
from trainkit.bench.measure.environment import Environment
from trainkit.bench.measure.statistics import Ratio
from trainkit.bench.race.protocol import Turn
from trainkit.bench.result import (
    BenchmarkSettings,
    EngineInfo,
    Measurement,
    Result,
    Scenario,
    Unavailable,
    WorkloadResult,
    percentile_intervals,
    summarize,
)
from trainkit.export.parity import CaseResult, ParityReport, Tolerance

TOKENS = 12  # of a text
CUDA = Unavailable(
    runtime="onnx-cuda",
    source="runs/latest/onnx",
    reason="this ONNX Runtime has no CUDAExecutionProvider",
)


class Truth(NamedTuple):
    """What an engine is, and how long it truly takes."""

    name: str
    runtime: str
    source: str
    call_ms: float
    token_us: float
    precision: str = "fp32"
    accuracy: float | None = None
    wrong: bool = False
    threads: int = 2
    includes_tokenization: bool = False
    model_sha256: str | None = None


TORCH = Truth("PyTorch eager", "torch", "runs/latest", 4.0, 60.0, accuracy=0.952)
ONNX = Truth("ONNX Runtime", "onnx", "runs/latest/onnx", 0.5, 40.0, accuracy=0.952)
INT8 = Truth("ONNX Runtime int8", "onnx", "runs/latest/int8", 0.4, 18.0, "int8", accuracy=0.944)
WRONG = Truth(
    "TorchScript", "torchscript", "runs/latest/torchscript", 0.1, 5.0, accuracy=0.17, wrong=True
)
ALL = (TORCH, ONNX, INT8, WRONG)


class Work(NamedTuple):
    """One workload: ``length`` and ``rate`` as in the result, ``batches`` a pass."""

    scenario: Scenario
    batch_size: int
    batches: int = 16
    length: int | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        """Return what the workload is called."""
        return {
            "offline": f"texts, batch {self.batch_size}",
            "single-stream": "single stream",
            "server": f"server, {self.rate or 0:g} requests/s",
            "grid": f"grid, {self.batch_size} x {self.length}",
        }[self.scenario]


OFFLINE = Work("offline", 32)


def engine(truth: Truth) -> EngineInfo:
    return EngineInfo(
        name=truth.name,
        runtime=truth.runtime,
        source=truth.source,
        precision=truth.precision,
        threads=truth.threads,
        load_s=0.75 + truth.call_ms,
        cold_start_s=0.9 + truth.call_ms,
        peak_rss_bytes=123_000_000,
        file_bytes=23_000_000 if truth.precision == "int8" else 91_000_000,
        includes_tokenization=truth.includes_tokenization,
        model_sha256=truth.model_sha256,
    )


def report(failed: int) -> ParityReport:
    reason = "3 of 32 labels changed"
    case = CaseResult(
        case="batch 1", passed=False, max_abs=0.3, max_rel=0.1, changed_labels=3, reason=reason
    )
    return ParityReport(
        precision="fp32",
        tolerance=Tolerance(2e-5, 2e-5),
        cases=2,
        rows=4,
        failed=failed,
        max_abs=0.3 if failed else 4e-7,
        max_rel=0.1,
        label_agreement=1.0,
        worst=(case,) if failed else (),
    )


def turns(
    truth: Truth, work: Work, rounds: int, noise: float, random: np.random.Generator
) -> tuple[Turn, ...]:
    """Measure, as it were; two passes a round."""
    taken_s = (
        truth.call_ms + truth.token_us * work.batch_size * (work.length or TOKENS) / 1e3
    ) / 1e3
    found = []
    for _ in range(rounds):
        factor = np.exp(random.normal(0, noise))
        batch_s = taken_s * factor * np.exp(random.normal(0, noise, size=(2, work.batches)))
        wall_s = batch_s.sum()
        if work.rate is not None:
            # Khinchin and Pollaczek: the mean wait of a queue with one server and fixed service.
            load = min(0.98, work.rate * taken_s)
            waits = taken_s * load / (2 * (1 - load))
            batch_s = batch_s + random.exponential(waits, size=batch_s.shape)
            batch_s = batch_s.reshape(1, -1)  # a schedule is one pass, however many requests it has
            wall_s = batch_s.size / work.rate
        passes = tuple(tuple(one) for one in batch_s.tolist())
        found.append(Turn(passes, float(wall_s), float(1.9 * taken_s * batch_s.size)))
    return tuple(found)


def rates(work: Work, rounds: Sequence[Turn]) -> list[float]:
    """Return texts/s, one a round."""
    return [work.batch_size * sum(map(len, turn.batch_s)) / turn.seconds for turn in rounds]


def workload(
    truths: Sequence[Truth], work: Work, rounds: int, noise: float, random: np.random.Generator
) -> WorkloadResult:
    measurements: list[Measurement] = []
    for number, truth in enumerate(truths):
        made = turns(truth, work, rounds, noise, random)
        batch_ms = [1000 * s for turn in made for one_pass in turn.batch_s for s in one_pass]
        percentiles: dict[str, Any] = {
            f"p{percent}_ms": float(np.percentile(batch_ms, percent))
            if len(batch_ms) >= enough
            else None
            for percent, enough in ((50, 20), (90, 50), (95, 100), (99, 459))
        }
        if work.rate is not None:
            passes = [turn.batch_s for turn in made]
            percentiles |= percentile_intervals(
                percentiles["p50_ms"], percentiles["p99_ms"], passes
            )
        if not number:
            baseline = rates(work, made)
        else:
            shares = np.divide(rates(work, made), baseline)
            low, high = np.quantile(shares, [0.1, 0.9])
            ratio = Ratio(float(np.median(shares)), float(low), float(high))
        measurements.append(
            Measurement(
                engine=number,
                texts_per_s=float(np.median(rates(work, made))),
                **percentiles,
                ratio=ratio if number else None,
                outputs=report(int(truth.wrong)) if number else None,
                wrong=truth.wrong,
                accuracy=None if work.length else truth.accuracy,
                cores_used=1.9,
                roofline_share=0.25,
                warm_up_s=made[0].seconds,
                warm_up_stable=True,
                rounds=tuple(summarize(*msgspec.structs.astuple(turn)) for turn in made),
            )
        )
    texts = work.batch_size * work.batches
    return WorkloadResult(
        name=work.name,
        scenario=work.scenario,
        batch_size=work.batch_size,
        length=work.length,
        rate=work.rate,
        texts=texts,
        batches=work.batches,
        tokens=texts * (work.length or TOKENS),
        padding_share=0.0 if work.length else 0.42,
        tokenisation_s=(0.01, 0.011),
        useful_flop=2.1e7 * texts,
        measurements=tuple(measurements),
    )


@cache
def _here() -> Environment:
    return environment.describe()


def result(
    truths: Sequence[Truth] = ALL,
    works: Sequence[Work] = (OFFLINE,),
    *,
    rounds: int = 20,
    noise: float = 0.03,
    seed: int = 0,
    **changed: Any,
) -> Result:
    """Return what a benchmark of ``truths`` would have found; ``changed`` fields are set last."""
    random = np.random.default_rng(seed)
    here = _here()
    made = Result(
        command=("trainkit", "bench", "run"),
        date=datetime(2026, 11, 22, tzinfo=UTC),
        data="sample, test",
        settings=BenchmarkSettings(threads=tuple(sorted({truth.threads for truth in truths}))),
        environment=here,
        environment_after=here,
        peak_flops={2: 1.2e11},
        noisy=False,
        noisy_because=(),
        engines=tuple(engine(truth) for truth in truths),
        unavailable=(CUDA,),
        workloads=tuple(workload(truths, work, rounds, noise, random) for work in works),
    )
    return msgspec.structs.replace(made, **changed)


def full(truths: Sequence[Truth] = ALL, **changed: Any) -> Result:
    """Return a result with every scenario, as for a report with all its plots."""
    works = [Work("offline", size) for size in (1, 4, 16, 64)]
    works += [Work("grid", size, length=n) for size in (1, 16) for n in (16, 32, 64, 128, 256)]
    works += [Work("single-stream", 1, batches=40)]
    works += [Work("server", 1, batches=40, rate=rate) for rate in (25, 50, 100, 150, 190)]
    return result(truths, works, **changed)


def slower(truth: Truth, factor: float) -> Truth:
    return truth._replace(call_ms=truth.call_ms * factor, token_us=truth.token_us * factor)


def environment_with(made: Result, changed: Mapping[str, Any]) -> Result:
    """Return the result as from another machine."""
    here = msgspec.structs.replace(made.environment, **changed)
    return msgspec.structs.replace(made, environment=here)

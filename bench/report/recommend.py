"""Which runtime, threads, batch size and precision to deploy, with the evidence for it.

A wrong engine is never recommended, and two engines are equal if the interval of their ratio
contains 1.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from trainkit.bench.measure.statistics import Ratio
from trainkit.bench.report.tables import engine_labels
from trainkit.bench.result import EngineInfo, Measurement, Result, WorkloadResult
from trainkit.serve.bundle import MANIFEST, Manifest, Serving, open_bundle, write_serving
from trainkit.serve.errors import CheckFailedError, InputError

# The runtimes that Classifier.load can open just as they were measured, and what ONNX Runtime
# calls where they run.
PROVIDERS = {
    "onnx": "CPUExecutionProvider",
    "onnx-workers": "CPUExecutionProvider",
    "onnx-cuda": "CUDAExecutionProvider",
}


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """The highest throughput; with ``latency_below_ms`` among engines whose batches take less.

    ``min_accuracy`` is in percent, ``max_accuracy_drop`` in percentage points below the workload's
    first engine. ``precision`` None allows any.
    """

    latency_below_ms: float | None = None
    min_accuracy: float | None = None
    max_accuracy_drop: float | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        limit, drop = self.latency_below_ms, self.max_accuracy_drop
        if limit is not None and not limit > 0:
            raise InputError(f"the latency limit must be above 0 ms, not {limit:g}.")
        if drop is not None and not drop >= 0:
            raise InputError(f"the accuracy drop must be 0 points or more, not {drop:g}.")
        if self.min_accuracy is not None and not 0 <= self.min_accuracy <= 100:
            raise InputError(
                f"the least accuracy must be a percentage from 0 to 100, not {self.min_accuracy:g}."
            )


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """An engine at a batch size, and what was measured.

    ``latency_ms`` is the percentile ``latency_percentile`` of one batch, the highest of p99, p95
    and p90 that the sample carries, or None.
    """

    name: str
    runtime: str
    source: str
    precision: str
    threads: int
    batch_size: int
    workload: str
    texts_per_s: float
    latency_percentile: int | None
    latency_ms: float | None
    accuracy: float | None
    model_sha256: str | None


class Rival(msgspec.Struct, frozen=True, kw_only=True):
    """Another choice; ``ratio`` is how many times as fast the recommended one is."""

    choice: Choice
    ratio: Ratio
    equal_within_noise: bool


class Recommendation(msgspec.Struct, frozen=True, kw_only=True):
    """``choice`` is None if nothing fits; ``nearest`` then missed the limit by the least.

    ``runner_up`` is the best choice of another engine, ``equals`` are all choices within the noise,
    ``excluded`` gives the reasons why others were not considered.
    """

    wanted: Wanted
    choice: Choice | None
    runner_up: Rival | None = None
    equals: tuple[Rival, ...] = ()
    nearest: Choice | None = None
    excluded: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class _Candidate(msgspec.Struct, frozen=True):
    """One measurement, and where it stands in the result."""

    choice: Choice
    workload: WorkloadResult
    measured: Measurement

    @property
    def speeds(self) -> list[float]:
        return self.workload.speeds(self.measured)


def recommend(result: Result, wanted: Wanted) -> Recommendation:
    """Choose an engine; raises ``InputError`` if the report lacks what is asked about."""
    pool, notes = _pool(result)
    excluded: list[str] = []
    sound: list[_Candidate] = []
    for candidate in _candidates(result, pool):
        reason = _unsound(candidate, wanted)
        if reason is None:
            sound.append(candidate)
        else:
            excluded.append(f"{_place(candidate.choice)}: {reason}")
    fitting = [candidate for candidate in sound if _fits(candidate.choice, wanted)]
    excluded += [
        f"{_place(candidate.choice)}: {_latency(candidate.choice)}"
        for candidate in sound
        if candidate not in fitting
    ]
    excluded += [f"{one.runtime}: not measured: {one.reason}" for one in result.unavailable]
    if result.noisy:
        notes.append(f"The benchmark was noisy: {'; '.join(result.noisy_because)}.")
    if not fitting:
        known = [one.choice for one in sound if one.choice.latency_ms is not None]
        nearest = min(known, key=lambda choice: choice.latency_ms or 0.0, default=None)
        return Recommendation(
            wanted=wanted,
            choice=None,
            nearest=nearest,
            excluded=tuple(excluded),
            notes=tuple(notes),
        )
    ranked = sorted(fitting, key=_rank, reverse=True)
    best, rivals = ranked[0], _rivals(ranked)
    others = [
        rival
        for rival, candidate in zip(rivals, ranked[1:], strict=True)
        if candidate.measured.engine != best.measured.engine
    ]
    if best.choice.name in _tokenising(result):
        notes.append("Its times include tokenization, those of other engines do not.")
    return Recommendation(
        wanted=wanted,
        choice=best.choice,
        runner_up=others[0] if others else None,
        equals=tuple(rival for rival in rivals if rival.equal_within_noise),
        excluded=tuple(excluded),
        notes=tuple(notes),
    )


def _pool(result: Result) -> tuple[list[WorkloadResult], list[str]]:
    """Return the workloads whose figures can be ranked with each other, and what to know of them.

    Texts come before full batches, which come before a load, where the arrivals set the texts a
    second; of full batches those of the greatest length, of loads the highest.
    """
    of_texts = [work for work in result.workloads if work.scenario in ("offline", "single-stream")]
    if of_texts:
        return of_texts, []
    grid = [work for work in result.workloads if work.scenario == "grid"]
    if grid:
        longest = max(work.length or 0 for work in grid)
        return (
            [work for work in grid if work.length == longest],
            [f"No texts were measured: figures are of full batches, {longest} tokens per text."],
        )
    if not result.workloads:
        raise InputError("the report has no workload; make another with: trainkit bench run")
    highest = max(result.workloads, key=lambda work: work.rate or 0.0)
    return [highest], [
        f"Only loads were measured: these figures are at {highest.rate:g} requests/s."
    ]


def _candidates(result: Result, pool: Sequence[WorkloadResult]) -> Iterator[_Candidate]:
    labels = engine_labels(result)
    for workload in pool:
        for measured in workload.measurements:
            engine = result.engines[measured.engine]
            yield _Candidate(
                _choice(labels[measured.engine], engine, workload, measured), workload, measured
            )


def _choice(
    label: str, engine: EngineInfo, workload: WorkloadResult, measured: Measurement
) -> Choice:
    carried = ((99, measured.p99_ms), (95, measured.p95_ms), (90, measured.p90_ms))
    percentile, latency = next(
        ((percent, value) for percent, value in carried if value is not None), (None, None)
    )
    return Choice(
        name=label,
        runtime=engine.runtime,
        source=engine.source,
        precision=engine.precision,
        threads=engine.threads,
        batch_size=workload.batch_size,
        workload=workload.name,
        texts_per_s=measured.texts_per_s,
        latency_percentile=percentile,
        latency_ms=latency,
        accuracy=measured.accuracy,
        model_sha256=engine.model_sha256,
    )


def _unsound(candidate: _Candidate, wanted: Wanted) -> str | None:
    """Return why this is not considered, regardless of its speed."""
    choice = candidate.choice
    if candidate.measured.wrong:
        return "its outputs are WRONG"
    if wanted.precision not in (None, choice.precision):
        return f"{choice.precision}, not {wanted.precision}"
    if wanted.min_accuracy is None and wanted.max_accuracy_drop is None:
        return None
    baseline = candidate.workload.measurements[0].accuracy
    if choice.accuracy is None or baseline is None:
        raise InputError(
            f"the report has no accuracy for {choice.name} on {choice.workload}; "
            "measure with labelled texts, or leave the accuracy options out."
        )
    accuracy, drop = 100 * choice.accuracy, 100 * (baseline - choice.accuracy)
    if wanted.min_accuracy is not None and accuracy < wanted.min_accuracy:
        return f"accuracy {accuracy:.1f}%, below {wanted.min_accuracy:g}%"
    # Shares of a few hundred texts: the difference of two is exact only up to rounding.
    if wanted.max_accuracy_drop is not None and drop > wanted.max_accuracy_drop + 1e-9:
        return f"accuracy {drop:.2f} points below the baseline's"
    return None


def _fits(choice: Choice, wanted: Wanted) -> bool:
    if wanted.latency_below_ms is None:
        return True
    return choice.latency_ms is not None and choice.latency_ms < wanted.latency_below_ms


def _rank(candidate: _Candidate) -> float:
    return float(np.median(candidate.speeds))


def _rivals(ranked: Sequence[_Candidate]) -> list[Rival]:
    """Compare the first with each of the others."""
    rivals = []
    for candidate in ranked[1:]:
        ratio = _ratio(ranked[0], candidate)
        rivals.append(
            Rival(
                choice=candidate.choice,
                ratio=ratio,
                equal_within_noise=ratio.low <= 1 <= ratio.high,
            )
        )
    return rivals


def _ratio(one: _Candidate, other: _Candidate) -> Ratio:
    """Compare round by round inside a workload, where rounds are interleaved; else as samples."""
    if one.workload is not other.workload or len(one.speeds) != len(other.speeds):
        return Ratio.of_samples(one.speeds, other.speeds)
    return Ratio.of_rounds(one.speeds, other.speeds)


def _tokenising(result: Result) -> set[str]:
    labels = engine_labels(result)
    return {
        label
        for label, engine in zip(labels, result.engines, strict=True)
        if engine.includes_tokenization
    }


def check(recommendation: Recommendation) -> None:
    """Raise ``CheckFailedError`` if nothing fits, with what came nearest."""
    if recommendation.choice is not None:
        return
    wanted, nearest = recommendation.wanted, recommendation.nearest
    if wanted.latency_below_ms is not None and nearest is not None:
        raise CheckFailedError(
            f"no engine keeps below {wanted.latency_below_ms:g} ms; the nearest is "
            f"{_place(nearest)}, {_latency(nearest)}."
        )
    raise CheckFailedError(f"no engine fits: {'; '.join(recommendation.excluded)}.")


def text(recommendation: Recommendation) -> str:
    """Return it in sentences, the choice first, then the evidence."""
    choice, runner_up = recommendation.choice, recommendation.runner_up
    lines = []
    if choice is not None:
        lines += [
            f"Deploy {choice.name}: runtime {choice.runtime}, {choice.source}, "
            f"{choice.threads} thread{'s' if choice.threads > 1 else ''}, "
            f"batch size {choice.batch_size}, {choice.precision}.",
            f"Measured on {choice.workload}: {choice.texts_per_s:,.0f} texts/s, {_latency(choice)}"
            f"{_accuracy(choice)}.",
        ]
        for rival in recommendation.equals:
            lines.append(f"Equal within noise: {_place(rival.choice)}, {_times(rival.ratio)}.")
        if runner_up is not None and not runner_up.equal_within_noise:
            other = runner_up.choice
            lines.append(
                f"Runner-up: {_place(other)}, {other.texts_per_s:,.0f} texts/s, {_latency(other)}"
                f"{_accuracy(other)}; the first is {_times(runner_up.ratio)}."
            )
        if runner_up is None:
            lines.append("No other engine fits.")
    lines += recommendation.notes
    lines += [f"Not considered: {sentence}." for sentence in recommendation.excluded]
    return "\n".join(lines)


def _place(choice: Choice) -> str:
    return f"{choice.name} ({choice.workload})"


def _latency(choice: Choice) -> str:
    if choice.latency_ms is None:
        return "too few batches to know p90 of its latency"
    return f"p{choice.latency_percentile} {choice.latency_ms:.2f} ms per batch"


def _accuracy(choice: Choice) -> str:
    return "" if choice.accuracy is None else f", accuracy {100 * choice.accuracy:.1f}%"


def _times(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} times as fast ({ratio.low:.2f} to {ratio.high:.2f})"


def write(recommendation: Recommendation, bundle: Path) -> Manifest:
    """Put the choice into the bundle's manifest, as defaults of ``Classifier.load``.

    Raises ``InputError`` if the choice is not that bundle, is not an ONNX bundle, or was another
    model when it was measured.
    """
    choice = recommendation.choice
    assert choice is not None  # check() comes first
    if not (bundle / MANIFEST).is_file():
        raise InputError(f"{bundle} is not a bundle (no {MANIFEST}); name the folder of one.")
    if Path(choice.source).resolve() != bundle.resolve():
        raise InputError(
            f"the recommendation is {choice.source}, not {bundle}; write it there, or run the "
            "benchmark again from the folder that its paths start in."
        )
    if choice.runtime not in PROVIDERS:
        raise InputError(
            f"{choice.name} is not served by Classifier.load, which takes ONNX bundles; "
            "recommend among those with: trainkit bench run on ONNX bundles alone"
        )
    opened = open_bundle(bundle)
    if choice.model_sha256 != opened.manifest.files[opened.model_path.name].sha256:
        raise InputError(
            f"{bundle} holds another model than the one that was measured; run the benchmark again."
        )
    at_once = choice.runtime == "onnx-workers"
    serving = Serving(
        threads=1 if at_once else choice.threads,
        workers=choice.threads if at_once else 1,
        batch_size=choice.batch_size,
        provider=PROVIDERS[choice.runtime],
    )
    return write_serving(bundle, serving)

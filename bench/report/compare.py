"""Two benchmarks of the same engines, before and after a change: which became slower.

The rounds of A and those of B were not measured at the same time, so they are two independent
samples: the ratio is that of their medians, and its interval comes from resampling both.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from trainkit.bench.measure.statistics import RATIO_RESAMPLES, SEED, Ratio
from trainkit.bench.report.tables import engine_labels, ratio_text
from trainkit.bench.result import (
    EngineInfo,
    Result,
    WorkloadResult,
)
from trainkit.serve.errors import CheckFailedError, InputError
from trainkit.tables import RowStyle, Table

Verdict: TypeAlias = Literal["faster", "slower", "no difference", "wrong outputs"]
METHOD = (
    f"ratio of the median speeds over rounds, B by A; 95% percentile bootstrap interval, "
    f"{RATIO_RESAMPLES} resamples of both samples of rounds independently, seed {SEED}"
)


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """One engine on one workload in A and in B.

    ``ratio`` is of speed, so that above 1 B is faster: of texts/s, and in the server
    scenario, where the load sets those, of the inverse median latency. ``p50_ratio`` and
    ``p99_ratio`` are of latency, B by A: above 1 B is slower; None if one lacks the percentile.
    """

    engine_a: str
    engine_b: str
    workload: str
    ratio: Ratio
    p50_ratio: float | None
    p99_ratio: float | None
    verdict: Verdict


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """All pairs, and in sentences what hinders the comparison or has no counterpart."""

    method: str
    pairs: tuple[Pair, ...]
    warnings: tuple[str, ...]
    unmatched: tuple[str, ...]


def parse_share(text: str) -> float:
    """Return "5%" as 0.05; ``InputError`` for anything else, a bare number too.

    "0.05" could mean either of two limits a hundredfold apart.
    """
    number = text.strip().removesuffix("%")
    try:
        percent = float(number)
    except ValueError:
        percent = -1.0
    if not text.strip().endswith("%") or not 0 <= percent < 100:
        raise InputError(
            f"'{text}' is not a limit; write a percentage from 0% up to below 100%, as: 5%"
        )
    return percent / 100


def compare(a: Result, b: Result) -> Comparison:
    """Match engines and workloads, and compare each pair; ``InputError`` if nothing matches."""
    engines = dict(_matches(a.engines, b.engines))
    works_b = {workload.name: workload for workload in b.workloads}
    pairs = []
    for work_a in a.workloads:
        work_b = works_b.get(work_a.name)
        if work_b is not None:
            pairs += list(_pairs(a, b, work_a, work_b, engines))
    unmatched = tuple(_unmatched(a, b, engines))
    if not pairs:
        raise InputError(
            "the two reports have no engine on a workload of the same name in common"
            f"{': ' if unmatched else ''}{'; '.join(unmatched)}. "
            "Compare two reports of one command."
        )
    return Comparison(
        method=METHOD, pairs=tuple(pairs), warnings=tuple(_warnings(a, b)), unmatched=unmatched
    )


def _matches(some: Sequence[EngineInfo], others: Sequence[EngineInfo]) -> Iterator[tuple[int, int]]:
    """Yield the indices of engines with the same runtime and number of threads.

    If there are several, those of the same source match, or else of the same last path component.
    """
    for kind in dict.fromkeys(map(_kind, some)):
        left = [number for number, engine in enumerate(some) if _kind(engine) == kind]
        right = [number for number, engine in enumerate(others) if _kind(engine) == kind]
        if len(left) == len(right) == 1:
            yield left[0], right[0]
            continue
        for by in (lambda engine: engine.source, lambda engine: Path(engine.source).name):
            for one in tuple(left):
                same = [two for two in right if by(others[two]) == by(some[one])]
                rivals = [two for two in left if by(some[two]) == by(some[one])]
                if len(same) == len(rivals) == 1:
                    yield one, same[0]
                    left.remove(one)
                    right.remove(same[0])


def _kind(engine: EngineInfo) -> tuple[str, int]:
    return engine.runtime, engine.threads


def _pairs(
    a: Result, b: Result, work_a: WorkloadResult, work_b: WorkloadResult, engines: dict[int, int]
) -> Iterator[Pair]:
    found_b = {measured.engine: measured for measured in work_b.measurements}
    labels_a, labels_b = engine_labels(a), engine_labels(b)
    for one in work_a.measurements:
        two = found_b.get(engines.get(one.engine, -1))
        if two is None:
            continue
        ratio = Ratio.of_samples(work_b.speeds(two), work_a.speeds(one))
        yield Pair(
            engine_a=labels_a[one.engine],
            engine_b=labels_b[two.engine],
            workload=work_a.name,
            ratio=ratio,
            p50_ratio=_by(two.p50_ms, one.p50_ms),
            p99_ratio=_by(two.p99_ms, one.p99_ms),
            verdict="wrong outputs" if one.wrong or two.wrong else _verdict(ratio),
        )


def _by(b: float | None, a: float | None) -> float | None:
    return None if a is None or b is None else b / a


def _verdict(ratio: Ratio) -> Verdict:
    if ratio.low > 1:
        return "faster"
    return "slower" if ratio.high < 1 else "no difference"


def _unmatched(a: Result, b: Result, engines: dict[int, int]) -> Iterator[str]:
    sides = (("A", a, engines.keys(), b), ("B", b, engines.values(), a))
    for side, result, matched, other in sides:
        for number, label in enumerate(engine_labels(result)):
            if number not in matched:
                yield f"only {side} has {label} ({result.engines[number].source})"
        names = {workload.name for workload in other.workloads}
        for workload in result.workloads:
            if workload.name not in names:
                yield f"only {side} has the workload {workload.name}"
    for work_a, work_b in _common(a, b):
        found_a = {measured.engine for measured in work_a.measurements}
        found_b = {measured.engine for measured in work_b.measurements}
        for one, two in engines.items():
            if (one in found_a) != (two in found_b):
                side = "A" if one in found_a else "B"
                yield f"only {side} has {engine_labels(a)[one]} on {work_a.name}"


def _common(a: Result, b: Result) -> Iterator[tuple[WorkloadResult, WorkloadResult]]:
    works_b = {workload.name: workload for workload in b.workloads}
    for workload in a.workloads:
        if workload.name in works_b:
            yield workload, works_b[workload.name]


def _warnings(a: Result, b: Result) -> Iterator[str]:
    differing = [
        f"{name} {one} in A, {two} in B" for name, one, two in _environments(a, b) if one != two
    ]
    if differing:
        yield f"The environments differ: {'; '.join(differing)}."
    other = [
        f"{one.name} ({one.texts} texts, {one.tokens} tokens in A; {two.texts}, {two.tokens} in B)"
        for one, two in _common(a, b)
        if (one.texts, one.tokens) != (two.texts, two.tokens)
    ]
    if other:
        yield f"The work is not the same: {'; '.join(other)}."
    noisy = [f"{side}: {'; '.join(r.noisy_because)}" for side, r in (("A", a), ("B", b)) if r.noisy]
    if len(noisy) == 2:
        yield f"Both are noisy ({'. '.join(noisy)}): measure again on a quiet machine."
    elif noisy:
        yield f"One is noisy ({noisy[0]})."


def _environments(a: Result, b: Result) -> Iterator[tuple[str, object, object]]:
    one, two = a.environment, b.environment
    for name in ("processor", "flags", "cores", "quota_cores", "python", "gpu"):
        yield name, getattr(one, name), getattr(two, name)
    for name in sorted({*one.versions, *two.versions}):
        yield name, one.versions.get(name), two.versions.get(name)


def check(comparison: Comparison, fail_if_slower: float) -> None:
    """Raise ``CheckFailedError`` for engines that are slower by more than that share.

    The whole interval must lie beyond the limit. Wrong outputs are not checked here.
    """
    failed = [
        f"{pair.engine_b} on {pair.workload} has {pair.ratio.median:.2f} of its speed before "
        f"({pair.ratio.low:.2f} to {pair.ratio.high:.2f})"
        for pair in comparison.pairs
        if pair.verdict != "wrong outputs" and pair.ratio.high < 1 - fail_if_slower
    ]
    if failed:
        raise CheckFailedError(
            f"slower by more than {100 * fail_if_slower:g}%: {'; '.join(failed)}."
        )


def table(comparison: Comparison) -> Table:
    """Lay out one row per pair; notes give warnings, what was not compared, and the method."""
    styles: dict[Verdict, RowStyle] = {"slower": "bad", "wrong outputs": "bad", "faster": "good"}
    return Table(
        columns=("engine", "workload", "speed B/A (95% interval)", "p50 B/A", "p99 B/A", "verdict"),
        rows=[
            (
                " -> ".join(dict.fromkeys((pair.engine_a, pair.engine_b))),
                pair.workload,
                ratio_text(pair.ratio, 3),
                "-" if pair.p50_ratio is None else f"{pair.p50_ratio:.2f}",
                "-" if pair.p99_ratio is None else f"{pair.p99_ratio:.2f}",
                pair.verdict,
            )
            for pair in comparison.pairs
        ],
        title="B compared with A",
        notes=(
            *(f"Warning: {warning}" for warning in comparison.warnings),
            *(f"Not compared: {sentence}." for sentence in comparison.unmatched),
            f"Method: {comparison.method}.",
        ),
        styles={
            place: styles[pair.verdict]
            for place, pair in enumerate(comparison.pairs)
            if pair.verdict in styles
        },
    )

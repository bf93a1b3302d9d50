"""The result of the study ``serving``, which docs/load.md describes."""

import statistics
from collections.abc import Iterator
from typing import Literal

import msgspec
import numpy as np

from trainkit import tables
from trainkit.bench.files import ReportHead
from trainkit.bench.measure.statistics import Interval, bootstrap_interval
from trainkit.bench.studies.serving.process import MemorySeries
from trainkit.serve.errors import CheckFailedError
from trainkit.tables import Table

FP32 = "trainkit fp32"  # the server that the goals are of


class ServingGoals(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the server is to reach; ``check`` holds the figures against it.

    The two ratios are goals where the p99 has to stay below ``p99_below_ms``.
    """

    p99_below_ms: float = 50.0
    over_naive: float = 5.0
    over_litserve: float = 1.5
    added_p50_ms: float = 1.5
    growth: float = 0.05


class ServerInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One server; ``about`` says how it is set up, ``versions`` what it is made of."""

    name: str
    about: str
    versions: dict[str, str]


class SentTexts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """SentTexts that are sent, one a request, and the p99 that a rate has to keep.

    The search begins at ``rate``. ``sha256`` is over the texts.
    """

    name: str
    count: int
    median_characters: int
    sha256: str
    p99_below_ms: float
    rate: float


class ServingPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is measured and how long; a resumed measurement must have the same."""

    servers: tuple[ServerInfo, ...]
    texts: tuple[SentTexts, ...]
    bundles: dict[str, str]  # each bundle's seal
    threads: int
    rounds: int
    duration_s: float
    warm_up_s: float
    max_search_s: float
    added_blocks: int
    soak_s: float
    soak_share: float
    idle_s: float


class Rate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The highest rate of a server on some texts, in one round; None where none kept the p99."""

    server: str
    texts: str
    round: int
    requests_per_s: float | None
    p50_ms: float | None
    p99_ms: float | None
    limited_by: str
    summary: str
    noisy_because: tuple[str, ...]


class ServerRatio(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many times the rate of ``other`` a ``server`` bears: median of the rounds' ratios."""

    server: str
    other: str
    texts: str
    median: float
    interval: Interval


class AddedTime(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One client, one text after the other: HTTP against the library's own call.

    ``added_p50_ms`` is the difference of the two p50; the interval is of the median of the blocks'
    own differences.
    """

    server: str
    library_p50_ms: float
    http_p50_ms: float
    added_p50_ms: float
    interval_ms: Interval


class Soak(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A long run at a share of the highest rate, random lengths; memory over its time.

    ``growth`` is each process's, see :func:`growth`, by role.
    """

    server: str
    seconds: float
    highest_per_s: float
    rate: float
    requests: int
    answered: int
    errors: dict[str, int]
    p50_ms: float | None
    p99_ms: float | None
    max_ms: float | None
    noisy_because: tuple[str, ...]
    growth: dict[str, float]
    memory: tuple[MemorySeries, ...]


class Idle(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """CPU seconds per second of a warm, idle server."""

    server: str
    seconds: float
    cpu_share: float


class ServingFigures(ReportHead, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The figures of all servers."""

    schema: Literal["trainkit-serving/2"] = "trainkit-serving/2"
    plan: ServingPlan
    goals: ServingGoals
    rates: tuple[Rate, ...]
    ratios: tuple[ServerRatio, ...]
    added: tuple[AddedTime, ...]
    soaks: tuple[Soak, ...]
    idle: tuple[Idle, ...]


def growth(series: MemorySeries) -> float:
    """Return by what share the median of the last fifth is above that of the second fifth.

    The first fifth is warm-up: an allocator fills its pools. Ten readings at least.
    """
    fifths = np.array_split(np.array(series.rss_bytes, dtype=np.float64), 5)
    early, late = float(np.median(fifths[1])), float(np.median(fifths[-1]))
    return late / early - 1


def ratios(rates: tuple[Rate, ...]) -> Iterator[ServerRatio]:
    """Compare each trainkit server with each other one, round by round.

    A round in which one of the two found no rate has no ratio, and a pair without any is left out.
    """
    found = {(one.server, one.texts, one.round): one.requests_per_s for one in rates}
    names = list(dict.fromkeys(one.server for one in rates))
    texts = list(dict.fromkeys(one.texts for one in rates))
    rounds = sorted({one.round for one in rates})
    ours = [name for name in names if name.startswith("trainkit")]
    for server, other, name in (
        (server, other, name) for name in texts for server in ours for other in names
    ):
        pairs = ((found.get((server, name, n)), found.get((other, name, n))) for n in rounds)
        values = [mine / theirs for mine, theirs in pairs if mine and theirs]
        if values and other not in ours:
            yield ServerRatio(
                server=server,
                other=other,
                texts=name,
                median=statistics.median(values),
                interval=bootstrap_interval(values),
            )


def check(serving: ServingFigures) -> None:
    """``CheckFailedError`` with everything that misses its goal."""
    faults = list(_faults(serving, serving.goals))
    if faults:
        raise CheckFailedError("The figures miss their goals: " + "; ".join(faults) + ".")


def _faults(serving: ServingFigures, goals: ServingGoals) -> Iterator[str]:
    wanted = {"naive": goals.over_naive, "litserve": goals.over_litserve}
    limits = {texts.name: texts.p99_below_ms for texts in serving.plan.texts}
    # fp32 against fp32: int8 is another model.
    found = {(one.texts, one.other): one for one in serving.ratios if one.server == FP32}
    measured = {(one.texts, one.server): one for one in serving.rates}
    for name, limit_ms in limits.items():
        for other, least in wanted.items():
            if limit_ms != goals.p99_below_ms or (name, other) not in measured:
                continue
            ratio = found.get((name, other))
            if ratio is None:
                yield f"no rate of both {FP32} and {other} on {name}"
            elif ratio.median < least:
                yield f"{ratio.median:.2f}x the rate of {other} on {name}, not {least:g}x"
    for added in serving.added:
        if added.added_p50_ms > goals.added_p50_ms:
            yield (
                f"HTTP adds {added.added_p50_ms:.2f} ms to {added.server}, not "
                f"{goals.added_p50_ms:g} ms at most"
            )
    for soak in serving.soaks:
        if soak.errors or soak.answered != soak.requests:
            yield f"{soak.server} had errors in the soak: {soak.errors}"
        for role, share in soak.growth.items():
            if share > goals.growth:
                yield (
                    f"the {role} process of {soak.server} grew by {100 * share:.1f}% in the "
                    f"soak, not {100 * goals.growth:g}% at most"
                )


def markdown(serving: ServingFigures) -> str:
    """Lay the figures out as tables."""
    limits = {texts.name: texts.p99_below_ms for texts in serving.plan.texts}
    rows = []
    for server, texts in dict.fromkeys((one.server, one.texts) for one in serving.rates):
        values = [
            one.requests_per_s
            for one in serving.rates
            if (one.server, one.texts) == (server, texts)
        ]
        rows.append((f"{server}, {texts}", f"{limits[texts]:g} ms", _rates(values)))
    columns = ("server, texts", "p99 below", "highest requests/s: median, all rounds")
    lines = [tables.markdown(Table(columns, rows)), ""]
    for ratio in serving.ratios:
        low, high = ratio.interval
        lines.append(
            f"- {ratio.texts}: {ratio.server} bears {ratio.median:.1f} times the rate of "
            f"{ratio.other} ({low:.1f} to {high:.1f})."
        )
    for added in serving.added:
        low, high = added.interval_ms
        lines.append(
            f"- {added.server}, one client: p50 {added.http_p50_ms:.2f} ms over HTTP, "
            f"{added.library_p50_ms:.2f} ms in the process: {added.added_p50_ms:.2f} ms more "
            f"({low:.2f} to {high:.2f})."
        )
    for soak in serving.soaks:
        grown = ", ".join(f"{role} {100 * share:+.1f}%" for role, share in soak.growth.items())
        p99 = "-" if soak.p99_ms is None else f"{soak.p99_ms:.1f} ms"
        lines.append(
            f"- {soak.server}, {soak.seconds / 60:.0f} minutes at {soak.rate:.0f} requests/s "
            f"of random lengths: {soak.requests - soak.answered} of {soak.requests:,} "
            f"failed, p99 {p99}, resident memory: {grown}."
        )
    for idle in serving.idle:
        lines.append(f"- {idle.server}, idle: {1000 * idle.cpu_share:.1f} ms of CPU per second.")
    return "\n".join(lines)


def _rates(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    every = ", ".join("none" if value is None else f"{value:.0f}" for value in values)
    return f"{statistics.median(known):.0f} ({every})" if len(known) == len(values) else every

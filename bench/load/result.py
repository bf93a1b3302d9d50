"""The report of a load test: what was asked of a server and what it did, without any credentials.

docs/load.md describes the fields; ``schema`` changes whenever they do.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from trainkit.bench import files
from trainkit.bench.load.settings import LoadSettings
from trainkit.bench.measure.statistics import MIN_SAMPLES, percentile

OK = "ok"
TIMEOUT = "timeout"

MIN_FOR_P99 = MIN_SAMPLES[99]

# Beyond these the generator measures itself.
NOISY_START_DELAY_MS = 5.0
NOISY_CPU_SHARE = 0.9


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """One counted request, as a JSON array; times are in seconds.

    ``due_s`` is from the run's start, all other times from the moment that it was due:
    ``start_delay_s`` until the generator took it up, ``send_delay_s`` until it also had a
    connection, ``latency_s`` until the whole answer was there. ``queued`` says that every
    connection was busy. ``outcome`` is "ok" or the kind of error.
    """

    due_s: float
    start_delay_s: float
    send_delay_s: float
    latency_s: float
    queued: bool
    outcome: str


class LoadRun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one rate did.

    ``rate`` was asked for; ``rate_offered`` is that of the requests that were due, and
    ``rate_answered`` that of the right answers. ``requests`` were counted, ``answered`` of them
    rightly; ``unfinished`` were cut off when the run was ended early. Percentiles are of right
    answers and of timeouts, which took at least so long; None where the sample does not carry them.
    ``start_delay_p99_ms`` is the generator's own lateness, without the wait of the ``queued``
    requests for a connection; ``cpu_share`` is its use of one core. In a search ``failed_because``
    says why the rate is too high.
    """

    rate: float
    rate_offered: float
    rate_answered: float
    warm_up_requests: int
    requests: int
    answered: int
    errors: dict[str, int]
    unfinished: int
    p50_ms: float | None
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    p999_ms: float | None
    max_ms: float | None
    start_delay_p99_ms: float | None
    queued: int
    cpu_share: float
    interrupted: bool
    noisy_because: tuple[str, ...]
    failed_because: tuple[str, ...] = ()
    samples: tuple[Sample, ...]


class RateSearch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The highest rate that kept p99 under the limit without errors; None where none did.

    ``rate`` is that run's ``rate_offered``: few Poisson arrivals have not quite the rate asked for.
    ``limited_by`` is what the next higher rate failed by, or what ended the search before any did.
    """

    p99_below_ms: float
    rate: float | None
    limited_by: Literal["server", "generator", "time", "probes", "interrupt"]
    summary: str


class LoadResult(files.ReportHead, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole load test; of a search, every rate that was tried, in order."""

    schema: Literal["trainkit-load/1"] = "trainkit-load/1"
    url: str
    data: str
    texts: int
    settings: LoadSettings
    runs: tuple[LoadRun, ...]
    search: RateSearch | None = None

    @property
    def interrupted(self) -> bool:
        """Return whether somebody ended it early."""
        stopped = self.search is not None and self.search.limited_by == "interrupt"
        return stopped or any(run.interrupted for run in self.runs)


def percentile_ms(seconds: Sequence[float], percent: float) -> float | None:
    """Return a percentile in milliseconds, or None where there are too few values to know it."""
    found = percentile(seconds, percent)
    return None if found is None else 1000 * found


def summarise(
    samples: Sequence[Sample],
    *,
    rate: float,
    warm_up_requests: int,
    unfinished: int,
    cpu_share: float,
    interrupted: bool,
    stolen: tuple[str, ...] = (),
) -> LoadRun:
    """Compute a run's figures from its counted requests, which may be none.

    ``stolen`` says what :func:`trainkit.bench.measure.environment.cpu_steal_monitor` saw.
    """
    samples = sorted(samples, key=lambda sample: sample.due_s)
    outcomes = Counter(sample.outcome for sample in samples)
    answered = outcomes.pop(OK, 0)
    known_s = [sample.latency_s for sample in samples if sample.outcome in (OK, TIMEOUT)]
    delays_s = [sample.start_delay_s for sample in samples]
    start_delay_p99_ms = 1000 * float(np.percentile(delays_s, 99)) if delays_s else None
    first_s, last_s = (samples[0].due_s, samples[-1].due_s) if samples else (0.0, 0.0)
    # A request stands for the time until the next one is due, the last one too.
    offered_s = last_s - first_s + 1 / rate
    end_s = max((sample.due_s + sample.latency_s for sample in samples), default=0.0)
    return LoadRun(
        rate=rate,
        rate_offered=len(samples) / offered_s,
        rate_answered=answered / max(offered_s, end_s - first_s),
        warm_up_requests=warm_up_requests,
        requests=len(samples),
        answered=answered,
        errors=dict(sorted(outcomes.items())),
        unfinished=unfinished,
        p50_ms=percentile_ms(known_s, 50),
        p90_ms=percentile_ms(known_s, 90),
        p95_ms=percentile_ms(known_s, 95),
        p99_ms=percentile_ms(known_s, 99),
        p999_ms=percentile_ms(known_s, 99.9),
        max_ms=1000 * max(known_s) if known_s else None,
        start_delay_p99_ms=start_delay_p99_ms,
        queued=sum(sample.queued for sample in samples),
        cpu_share=cpu_share,
        interrupted=interrupted,
        noisy_because=(*_noise(start_delay_p99_ms, cpu_share), *stolen),
        samples=tuple(samples),
    )


def _noise(start_delay_p99_ms: float | None, cpu_share: float) -> tuple[str, ...]:
    """Return why the generator, not the server, may be what was measured."""
    reasons = []
    if start_delay_p99_ms is not None and start_delay_p99_ms > NOISY_START_DELAY_MS:
        reasons.append(
            f"the generator itself sent late (p99 of the delay {start_delay_p99_ms:.1f} ms)"
        )
    if cpu_share > NOISY_CPU_SHARE:
        reasons.append(f"the generator used {100 * cpu_share:.0f}% of its one core")
    return tuple(reasons)


def save(result: LoadResult, path: Path) -> None:
    """Write the report as JSON; never half of it."""
    files.write(path, msgspec.json.encode(result) + b"\n")


def load(path: Path) -> LoadResult:
    """Read what :func:`save` wrote; raises ``InputError`` for any other file."""
    return files.read(path, LoadResult, "trainkit bench load")

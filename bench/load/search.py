"""The search for the highest rate that a server bears: doubling or halving, then bisection.

It knows nothing of HTTP: a probe takes a rate and returns what happened.
"""

import math
import time
from collections.abc import Callable
from typing import Literal, TypeAlias

import msgspec

from trainkit.bench.load.result import OK, LoadRun, RateSearch, Sample

MAX_PROBES = 24
LOWEST = 1.0  # requests/s: a p99 of fewer takes minutes
PRECISION = 1.05  # a rate that passes and one that fails are at last as close as this

Ended: TypeAlias = Literal["", "time", "probes", "interrupt"]
WHY_ENDED: dict[Ended, str] = {
    "time": "the time was over",
    "probes": f"{MAX_PROBES} probes were made",
    "interrupt": "it was interrupted",
}


def find_rate(
    probe: Callable[[float], LoadRun],
    *,
    start: float,
    p99_below_ms: float,
    max_seconds: float,
    seconds_of: Callable[[float], float],
    on_progress: Callable[[str], None] = lambda step: None,
) -> tuple[list[LoadRun], RateSearch]:
    """Return every probe in order, and what they show; it begins with the rate ``start``.

    ``seconds_of`` tells how long a probe of a rate takes: none is begun that would end after
    ``max_seconds``. One that failed while the generator itself was late, or its machine was busy
    elsewhere, says little of the server, and is repeated once.
    """
    began = time.monotonic()
    runs: list[LoadRun] = []
    passed: LoadRun | None = None
    failed: LoadRun | None = None
    rate, repeats = start, False
    while True:
        if len(runs) == MAX_PROBES:
            return runs, _search("probes", passed, failed, p99_below_ms)
        if time.monotonic() - began + seconds_of(rate) > max_seconds:
            return runs, _search("time", passed, failed, p99_below_ms)
        on_progress(f"{rate:.1f} requests/s, probe {len(runs) + 1}")
        try:
            run = _judged(probe(rate), p99_below_ms)
        except KeyboardInterrupt:
            return runs, _search("interrupt", passed, failed, p99_below_ms)
        runs.append(run)
        if run.interrupted:
            return runs, _search("interrupt", passed, failed, p99_below_ms)
        if not run.failed_because:
            passed = run
        elif run.noisy_because and not repeats:
            repeats = True
            continue
        else:
            failed = run
        repeats = False
        if failed is None:
            rate *= 2
        elif passed is None and failed.rate / 2 >= LOWEST:
            rate = failed.rate / 2
        elif passed is None or failed.rate <= PRECISION * passed.rate:
            return runs, _search("", passed, failed, p99_below_ms)
        else:
            rate = math.sqrt(passed.rate * failed.rate)


def hopeless(p99_below_ms: float, requests: int) -> Callable[[Sample], bool]:
    """Return a watch that ends a run of ``requests`` once it has failed for sure."""
    allowed = 0.01 * (requests - 1) + 1  # more above the limit, and the p99 is above it too
    late = 0

    def watch(sample: Sample) -> bool:
        nonlocal late
        late += _is_late(sample, p99_below_ms)
        return sample.outcome != OK or late > allowed

    return watch


def _is_late(sample: Sample, p99_below_ms: float) -> bool:
    return 1000 * sample.latency_s >= p99_below_ms


def _judged(run: LoadRun, p99_below_ms: float) -> LoadRun:
    reasons = [f"{count} of {run.requests} ended in {kind}" for kind, count in run.errors.items()]
    late = sum(_is_late(sample, p99_below_ms) for sample in run.samples)
    if late and (run.p99_ms is None or run.p99_ms >= p99_below_ms):
        reasons.append(f"{late} of {run.requests} took {p99_below_ms:g} ms or more")
    return msgspec.structs.replace(run, failed_because=tuple(reasons))


def _search(
    ended: Ended, passed: LoadRun | None, failed: LoadRun | None, p99_below_ms: float
) -> RateSearch:
    """Say in one sentence what was found, and what stood in the way of more."""
    limited_by = ended or ("generator" if failed and failed.noisy_because else "server")
    goal = f"p99 below {p99_below_ms:g} ms without errors"
    if passed:
        found = f"{passed.rate_offered:.1f} requests/s with {goal} ({passed.rate:.1f} asked)"
    elif failed:
        found = f"not even {failed.rate:.1f} requests/s had {goal}"
    else:
        found = f"no rate was found with {goal}"
    if failed is None:
        found += "; none failed"
    else:
        found += f"; at {failed.rate:.1f}/s {', '.join(failed.failed_because)}"
        if failed.noisy_because:
            found += (
                f", but there {' and '.join(failed.noisy_because)}: that was the limit, and the "
                "server may bear more"
            )
    if ended:
        found += f"; {WHY_ENDED[ended]} before the search was done"
    return RateSearch(
        p99_below_ms=p99_below_ms,
        rate=passed.rate_offered if passed else None,
        limited_by=limited_by,
        summary=found + ".",
    )

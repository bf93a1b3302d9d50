"""A load test's result as a table."""

from collections.abc import Iterator

from trainkit.bench.load.result import LoadResult, LoadRun
from trainkit.bench.report.tables import noise
from trainkit.tables import Table

COLUMNS = (
    "requests/s",
    "answered/s",
    "requests",
    "errors",
    "p50 ms",
    "p90 ms",
    "p95 ms",
    "p99 ms",
    "p99.9 ms",
    "max ms",
    "late ms",
    "CPU %",
)


def table(result: LoadResult) -> Table:
    """Lay out one row per rate; notes report errors, the search's end, and noise."""
    settings = result.settings
    return Table(
        columns=COLUMNS,
        rows=[tuple(_cells(run)) for run in result.runs],
        title=(
            f"{result.url}: {settings.protocol}, {settings.arrivals} arrivals, "
            f"{settings.texts_per_request} of {result.texts} texts per request"
        ),
        notes=tuple(_notes(result)),
        styles={
            place: "bad"
            for place, run in enumerate(result.runs)
            if run.errors or run.failed_because
        },
    )


def _cells(run: LoadRun) -> Iterator[str]:
    yield from (f"{run.rate:,.1f}", f"{run.rate_answered:,.1f}", f"{run.requests:,}")
    yield f"{sum(run.errors.values()):,}"
    times = (run.p50_ms, run.p90_ms, run.p95_ms, run.p99_ms, run.p999_ms, run.max_ms)
    for milliseconds in (*times, run.start_delay_p99_ms):
        yield "-" if milliseconds is None else f"{milliseconds:,.2f}"
    yield f"{100 * run.cpu_share:.0f}"


def _notes(result: LoadResult) -> Iterator[str]:
    for run in result.runs:
        at = f"At {run.rate:g}/s"
        if run.errors:
            yield f"{at}: {', '.join(f'{count} x {kind}' for kind, count in run.errors.items())}."
        if run.queued:
            yield (
                f"{at} {run.queued} requests waited for one of the {result.settings.connections} "
                "connections; the wait counts."
            )
        if run.interrupted:
            yield f"{at} it was interrupted; {run.unfinished} requests had no answer yet."
    if result.search is not None:
        yield f"Found: {result.search.summary}"
    if sentence := noise(result):
        yield sentence

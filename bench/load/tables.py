"""A load test's report for people, on the terminal; drawn from the result alone."""

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from trainkit.bench.load.result import LoadResult, LoadRun

__all__ = ["table"]

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
    """Lay out one row a rate; the caption holds errors, the search's end, and doubts."""
    settings = result.settings
    title = (
        f"{escape(result.url)}: {settings.protocol}, {settings.arrivals} arrivals, "
        f"{settings.texts_per_request} of {result.texts} texts a request"
    )
    laid_out = Table(title=title, caption=escape("\n".join(_remarks(result))) or None)
    for column in COLUMNS:
        laid_out.add_column(column, justify="right")
    for run in result.runs:
        laid_out.add_row(*_cells(run), style="red" if run.errors or run.failed_because else None)
    return laid_out


def _cells(run: LoadRun) -> Iterator[str]:
    yield from (f"{run.rate:,.1f}", f"{run.rate_answered:,.1f}", f"{run.requests:,}")
    yield f"{sum(run.errors.values()):,}"
    times = (run.p50_ms, run.p90_ms, run.p95_ms, run.p99_ms, run.p999_ms, run.max_ms)
    for milliseconds in (*times, run.start_delay_p99_ms):
        yield "-" if milliseconds is None else f"{milliseconds:,.2f}"
    yield f"{100 * run.cpu_share:.0f}"


def _remarks(result: LoadResult) -> Iterator[str]:
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
    if result.noisy:
        yield f"Noisy: {'; '.join(result.noisy_because)}."

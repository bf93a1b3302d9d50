"""A benchmark's report for people, on the terminal or in Markdown; drawn from the result alone."""

from collections import Counter
from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from trainkit.bench.result import EngineResult, Result

__all__ = ["markdown", "table"]

COLUMNS = (
    "engine",
    "texts/s",
    "p50 ms per batch",
    "ratio (95 % interval)",
    "largest difference",
    "peak MB",
    "load s",
)


def table(result: Result) -> Table:
    """Lay out one row an engine; the caption says why timings deserve less trust."""
    laid_out = Table(title=_title(result), caption=escape(_noise(result)) or None)
    for column in COLUMNS:
        laid_out.add_column(column, justify="left" if column == "engine" else "right")
    for engine, cells in zip(result.engines, _rows(result), strict=True):
        laid_out.add_row(*map(escape, cells), style="red" if engine.wrong else None)
    return laid_out


def markdown(result: Result) -> str:
    """Return the same as a Markdown table between its title and what it was measured on."""
    lines = [
        f"**{_title(result)}**",
        "",
        _markdown_row(COLUMNS),
        _markdown_row(("---", *["---:"] * (len(COLUMNS) - 1))),
        *(_markdown_row(cells) for cells in _rows(result)),
        "",
        _machine(result),
    ]
    if result.noisy:
        lines += ["", _noise(result)]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _title(result: Result) -> str:
    settings = result.settings
    return (
        f"{result.texts} texts in batches of {settings.batch_size}, "
        f"{100 * result.padding_share:.0f} % padding, {settings.threads} threads, "
        f"{len(result.engines[0].rounds)} rounds"
    )


def _noise(result: Result) -> str:
    return f"Noisy: {'; '.join(result.noisy_because)}." if result.noisy else ""


def _machine(result: Result) -> str:
    machine = result.environment_before
    versions = [f"{name} {version}" for name, version in machine.versions.items() if version]
    return (
        f"{machine.processor} ({', '.join(machine.flags) or 'no vector flags known'}), "
        f"{machine.cores} cores, GPU {machine.gpu}; Python {machine.python}, "
        f"{', '.join(versions)}; {result.date:%Y-%m-%d}."
    )


def _rows(result: Result) -> Iterator[tuple[str, ...]]:
    names = Counter(engine.name for engine in result.engines)
    for engine in result.engines:
        # Two engines of one kind are told apart by what they were given.
        alone = names[engine.name] == 1
        yield (
            engine.name if alone else f"{engine.name} ({engine.source})",
            f"{engine.texts_per_s:,.0f}",
            "-" if engine.p50_ms is None else f"{engine.p50_ms:.2f}",
            _ratio(engine),
            _difference(engine),
            "-" if engine.peak_rss_bytes is None else f"{engine.peak_rss_bytes / 1e6:,.0f}",
            f"{engine.load_s:.2f}",
        )


def _ratio(engine: EngineResult) -> str:
    ratio = engine.ratio
    if ratio is None:
        return "baseline"
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _difference(engine: EngineResult) -> str:
    if engine.outputs is None:
        return "baseline"
    largest = engine.outputs.max_abs
    return "WRONG" if engine.wrong else f"{largest:.0e}" if largest else "0"

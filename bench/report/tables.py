"""A benchmark's result as tables: on the terminal, as Markdown and as CSV.

:func:`sheets` lays out one table per workload, from which each form is made
(:mod:`trainkit.bench.report.html` makes the HTML page).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.text import Text

from trainkit import tables
from trainkit.bench.engines.peers import CONVERSIONS
from trainkit.bench.files import ReportHead
from trainkit.bench.measure.statistics import Ratio
from trainkit.bench.result import EngineInfo, Measurement, Result, Unavailable, WorkloadResult
from trainkit.tables import Table

RATIO = "ratio (95% interval)"
PERCENTILES = (50, 90, 95, 99)
# Notes below a table, on the engines for which the condition holds.
NOTES: tuple[tuple[str, Callable[[EngineInfo], bool]], ...] = (
    ("Times include tokenization for", lambda engine: engine.includes_tokenization),
    (
        "Load time, cold start, peak memory and files include the model conversion for",
        lambda engine: engine.runtime in CONVERSIONS,
    ),
)
LATENCY = {
    "offline": "ms per batch",
    "single-stream": "ms per text",
    "server": "ms since due",
    "grid": "ms per batch",
}


class _Column(NamedTuple):
    """A heading and its cells; left out if no engine has a figure."""

    heading: str
    cell: Callable[[EngineInfo, Measurement], str | None]


ENGINE_CELLS: dict[str, Callable[[EngineInfo], str | None]] = {
    "peak MB": lambda engine: _megabytes(engine.peak_rss_bytes),
    "file MB": lambda engine: _megabytes(engine.file_bytes),
    "load s": lambda engine: f"{engine.load_s:.2f}",
    "cold start s": lambda engine: f"{engine.cold_start_s:.2f}",
}


def table(result: Result) -> RenderableType:
    """Return what the terminal shows: the workloads, the engines, and the footer.

    What does not depend on the workload has a table of its own, since a terminal is narrow.
    """
    parts: list[RenderableType] = []
    for workload in result.workloads:
        parts += [_sheet(result, workload, _columns(workload, _threads(result) is None)), ""]
    return Group(*parts, engine_table(result), *map(Text, footer(result)))


def engine_table(result: Result) -> Table:
    """Lay out what an engine has on every workload alike."""
    columns = [
        name for name, cell in ENGINE_CELLS.items() if any(cell(one) for one in result.engines)
    ]
    rows = [
        (label, *(ENGINE_CELLS[name](engine) or "-" for name in columns))
        for label, engine in zip(engine_labels(result), result.engines, strict=True)
    ]
    return Table(("engine", *columns), rows, "Engines")


def markdown(result: Result) -> str:
    """Return the same as Markdown, with the engines' columns in each table."""
    parts = [tables.markdown(sheet) for sheet in sheets(result)]
    return "\n\n".join((*parts, *footer(result))) + "\n"


def footer(result: Result) -> list[str]:
    """Return the sentences below all tables: what was not measured, machine, noise."""
    sentences = (*not_measured(result, result.unavailable), machine(result), noise(result))
    return [sentence for sentence in sentences if sentence]


def sheets(result: Result) -> Iterator[Table]:
    """Yield one table per workload, in the result's order, with everything known of each engine."""
    engine_columns = [
        _Column(name, lambda engine, _, cell=cell: cell(engine))  # type: ignore[misc]
        for name, cell in ENGINE_CELLS.items()
    ]
    for workload in result.workloads:
        yield _sheet(
            result, workload, [*_columns(workload, _threads(result) is None), *engine_columns]
        )


def _sheet(result: Result, workload: WorkloadResult, columns: Iterable[_Column]) -> Table:
    labels = engine_labels(result)
    measured = [(result.engines[m.engine], m) for m in workload.measurements]
    known = [one for one in columns if any(one.cell(*pair) is not None for pair in measured)]
    return Table(
        columns=("engine", *(one.heading for one in known)),
        rows=[
            (labels[m.engine], *(one.cell(engine, m) or "-" for one in known))
            for engine, m in measured
        ],
        title=_title(result, workload),
        notes=(*_notes(result, workload), *not_measured(result, workload.unavailable)),
        styles={place: "bad" for place, (_, m) in enumerate(measured) if m.wrong},
    )


def _columns(workload: WorkloadResult, threads_differ: bool) -> Iterator[_Column]:
    latency = LATENCY[workload.scenario]
    if threads_differ:
        yield _Column("threads", lambda engine, _: str(engine.threads))
    yield _Column("texts/s", lambda _, measured: rate_text(measured.texts_per_s))
    yield _Column(f"p50 {latency}", lambda _, measured: _milliseconds(measured.p50_ms))
    yield _Column(f"p99 {latency}", lambda _, measured: _milliseconds(measured.p99_ms))
    yield _Column(
        RATIO, lambda _, measured: ratio_text(measured.ratio) if measured.ratio else "baseline"
    )
    yield _Column("differs by", lambda _, measured: _difference(measured))
    yield _Column("accuracy", lambda _, measured: _percent(measured.accuracy, 1))
    yield _Column("roofline share", lambda _, measured: _percent(measured.roofline_share, 0))


def _milliseconds(value: float | None) -> str | None:
    return None if value is None else f"{value:,.2f}"


def _percent(share: float | None, digits: int) -> str | None:
    return None if share is None else f"{100 * share:.{digits}f}%"


def _megabytes(size_bytes: int | None) -> str | None:
    return f"{size_bytes / 1e6:,.0f}" if size_bytes else None


def ratio_text(ratio: Ratio, digits: int = 2) -> str:
    """Return a ratio with its interval."""
    return f"{ratio.median:.{digits}f} ({ratio.low:.{digits}f} to {ratio.high:.{digits}f})"


def _difference(measured: Measurement) -> str:
    if measured.wrong:
        return "WRONG"
    if measured.outputs is None:
        return "baseline" if measured.ratio is None else "-"
    largest = measured.outputs.max_abs
    return f"{largest:.0e}" if largest else "0"


def _title(result: Result, workload: WorkloadResult) -> str:
    work = f"{workload.texts} texts"
    if workload.scenario == "grid":
        work = f"{workload.batches} full batches of the texts' tokens"
    elif workload.scenario == "server":
        work += ", Poisson arrivals"
    threads = _threads(result)
    rounds = max((len(measured.rounds) for measured in workload.measurements), default=0)
    facts = (
        work,
        f"{100 * workload.padding_share:.0f}% padding",
        "" if threads is None else f"{threads} thread{'s' if threads > 1 else ''}",
        f"{rounds} rounds",
    )
    return f"{workload.name}: {', '.join(filter(None, facts))}"


def _threads(result: Result) -> int | None:
    """Return the number of threads that all engines have, or None if they differ."""
    numbers = {engine.threads for engine in result.engines}
    return numbers.pop() if len(numbers) == 1 else None


def _notes(result: Result, workload: WorkloadResult) -> Iterator[str]:
    labels = engine_labels(result)
    for note, applies in NOTES:
        numbers = [m.engine for m in workload.measurements if applies(result.engines[m.engine])]
        if numbers:
            yield f"{note}: {', '.join(labels[number] for number in numbers)}."
    for m in workload.measurements:
        if m.wrong:
            yield f"{labels[m.engine]} is WRONG, so its speed means nothing: {_why(m)}."


def _why(measured: Measurement) -> str:
    outputs = measured.outputs
    if outputs is None:
        return "its outputs could not be compared"
    return f"{outputs.why} ({outputs.max_abs:.1e})"


def rate_text(per_s: float) -> str:
    """Return a rate without decimals, or with one if it is low."""
    return f"{per_s:,.0f}" if per_s >= 20 else f"{per_s:.1f}"


def engine_labels(result: Result) -> list[str]:
    """Return a distinct label for each engine.

    Its name; with the source if several share the name, and with threads if those differ.
    """
    sources: dict[str, set[tuple[str, str]]] = {}
    for engine in result.engines:
        sources.setdefault(engine.name, set()).add((engine.runtime, engine.source))
    labels = []
    for engine in result.engines:
        label = engine.name
        if len(sources[engine.name]) > 1:
            label += f" ({engine.source})"
        if _threads(result) is None:
            label += f", {engine.threads} thread{'s' if engine.threads > 1 else ''}"
        labels.append(label)
    times = Counter(labels)
    return [
        label if times[label] == 1 else f"{label} #{number}"
        for number, label in enumerate(labels, start=1)
    ]


def not_measured(result: Result, unavailable: Sequence[Unavailable]) -> list[str]:
    """Return one sentence per reason, with all runtimes that it applies to."""
    labels: dict[str, list[str]] = {}
    for one in unavailable:
        labels.setdefault(one.reason, []).append(_unavailable_label(result, one))
    return [
        f"Not measured: {', '.join(dict.fromkeys(names))}: {reason}."
        for reason, names in labels.items()
    ]


def _unavailable_label(result: Result, one: Unavailable) -> str:
    """Return the runtime's name, with the source if another of its sources fared otherwise."""
    sources = {engine.source for engine in result.engines if engine.runtime == one.runtime}
    sources |= {
        other.source
        for other in result.unavailable
        if other.runtime == one.runtime and other.reason != one.reason
    }
    return f"{one.runtime} ({one.source})" if sources - {one.source} else one.runtime


def noise(report: ReportHead) -> str:
    """Return one sentence on why to trust the timings less, or an empty one."""
    return f"Noisy: {'; '.join(report.noisy_because)}." if report.noisy else ""


def machine(report: ReportHead) -> str:
    """Return one line on the machine, the versions and the date of a measurement."""
    here = report.environment
    versions = [f"{name} {version}" for name, version in here.versions.items() if version]
    return (
        f"{here.processor} ({', '.join(here.flags) or 'no vector flags known'}), "
        f"{here.cores} cores, GPU {here.gpu}; Python {here.python}, "
        f"{', '.join(versions)}; {report.date:%Y-%m-%d}."
    )


def csv(result: Result) -> str:
    """Return one row per measurement with all its figures, in full precision and the JSON's units.

    A cell is empty if there is no figure. An unavailable engine has a row too, with the reason in
    ``not_measured``.
    """
    return tables.csv(list(_records(result)))


def _records(result: Result) -> Iterator[dict[str, Any]]:
    names = ("scenario", "batch_size", "length", "rate", "texts", "batches", "tokens")
    for workload in result.workloads:
        work: dict[str, Any] = {"workload": workload.name}
        work |= {name: getattr(workload, name) for name in names}
        work |= {"padding_share": workload.padding_share, "useful_flop": workload.useful_flop}
        for measured in workload.measurements:
            yield work | _figures(result.engines[measured.engine], measured)
        for one in (*workload.unavailable, *result.unavailable):
            yield work | {
                "runtime": one.runtime,
                "source": one.source,
                "not_measured": one.reason,
            }


def _figures(engine: EngineInfo, measured: Measurement) -> dict[str, Any]:
    ratio, outputs = measured.ratio, measured.outputs
    return {
        "engine": engine.name,
        "runtime": engine.runtime,
        "source": engine.source,
        "precision": engine.precision,
        "threads": engine.threads,
        "includes_tokenization": engine.includes_tokenization,
        "texts_per_s": measured.texts_per_s,
        **{f"p{percent}_ms": getattr(measured, f"p{percent}_ms") for percent in PERCENTILES},
        "ratio_median": ratio and ratio.median,
        "ratio_low": ratio and ratio.low,
        "ratio_high": ratio and ratio.high,
        "max_abs": outputs and outputs.max_abs,
        "label_agreement": outputs and outputs.label_agreement,
        "wrong": measured.wrong,
        "accuracy": measured.accuracy,
        "cores_used": measured.cores_used,
        "roofline_share": measured.roofline_share,
        "peak_rss_bytes": engine.peak_rss_bytes,
        "file_bytes": engine.file_bytes,
        "load_s": engine.load_s,
        "cold_start_s": engine.cold_start_s,
        "rounds": len(measured.rounds),
        "warm_up_stable": measured.warm_up_stable,
        "not_measured": "",
    }

"""A benchmark's report as tables: on the terminal, in Markdown, as CSV; from the result alone.

In goes a :class:`Result`; :func:`sheets` lays out one table a workload, and what is drawn from it
(here, and in HTML by :mod:`trainkit.bench.report.html`) says the same in each of its forms.
"""

import csv as csv_module
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trainkit.bench.engines.peers import CONVERSIONS
from trainkit.bench.result import Absent, Engine, Measurement, Result, WorkloadResult

__all__ = [
    "Row",
    "Sheet",
    "csv",
    "engine_labels",
    "machine",
    "markdown",
    "noise",
    "not_measured",
    "rate_cell",
    "ratio_cell",
    "sheets",
    "table",
]

RATIO = "ratio (95 % interval)"
PERCENTILES = (50, 90, 95, 99)
# What is said of an engine below its table, and when.
SAID: tuple[tuple[str, Callable[[Engine], bool]], ...] = (
    ("With tokenisation in their times", lambda engine: engine.tokenises),
    (
        "With their own export in load, cold start and peak, and the files of what they export",
        lambda engine: engine.runtime in CONVERSIONS,
    ),
)
LATENCY = {
    "offline": "ms per batch",
    "single-stream": "ms per text",
    "server": "ms since due",
    "grid": "ms per batch",
}


class Row(NamedTuple):
    """One engine: a cell a column, or the reason why it was not measured and no cells."""

    engine: str
    cells: tuple[str, ...] = ()
    wrong: bool = False
    absent: str = ""


class Sheet(NamedTuple):
    """The table of one workload; ``notes`` are sentences that belong below it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


class _Column(NamedTuple):
    """A heading and what stands below it; left out where no engine of the workload has it."""

    heading: str
    cell: Callable[[Engine, Measurement], str | None]


class _EngineColumn(NamedTuple):
    """The same where it does not depend on the workload."""

    heading: str
    cell: Callable[[Engine], str | None]

    def of_any_work(self, engine: Engine, _: Measurement) -> str | None:
        return self.cell(engine)


def table(result: Result) -> RenderableType:
    """Lay out the workloads one below the other, then the engines, noise and machine.

    In ``Text``, not strings: names and paths are the user's, and "[/x]" in one is no markup. What
    an engine has on every workload alike stands in one table of its own: a terminal is narrow.
    """
    parts: list[RenderableType] = []
    for workload in result.workloads:
        sheet = _sheet(result, workload, _columns(workload, _threads(result) is None))
        sheet = sheet._replace(rows=tuple(row for row in sheet.rows if not row.absent))
        parts += [_table(sheet), *map(Text, sheet.notes)]
        parts += map(Text, not_measured(result, workload.absent))
        parts.append("")
    parts.append(_table(_engines(result)))
    sentences = (*not_measured(result, result.absent), noise(result), machine(result))
    parts += [Text(line) for line in sentences if line]
    return Group(*parts)


def _table(sheet: Sheet) -> Table:
    # Eight columns in 80 characters: headings are narrow and tall, and only engines' names wrap.
    laid_out = Table(title=Text(sheet.title), box=SIMPLE_HEAD, show_edge=False, padding=0)
    laid_out.add_column("engine", overflow="fold")
    for column in sheet.columns:
        heading = column.replace(" ", "\n", 1 if column == RATIO else -1)
        laid_out.add_column(heading, justify="right", no_wrap=True)
    for row in sheet.rows:
        laid_out.add_row(*map(Text, (row.engine, *row.cells)), style="red" if row.wrong else None)
    return laid_out


def _engines(result: Result) -> Sheet:
    """Lay out what an engine has on every workload alike."""
    columns = _engine_columns(result.engines)
    rows = [
        Row(label, tuple(column.cell(engine) or "-" for column in columns))
        for label, engine in zip(engine_labels(result), result.engines, strict=True)
    ]
    return Sheet("Engines", tuple(column.heading for column in columns), tuple(rows), ())


def markdown(result: Result) -> str:
    """Return the same as Markdown tables, each below its title."""
    lines = []
    for sheet in sheets(result):
        lines += [f"**{sheet.title}**", "", _markdown_row(("engine", *sheet.columns))]
        lines.append(_markdown_row(("---", *["---:"] * len(sheet.columns))))
        for row in sheet.rows:
            absent = (f"not measured: {row.absent}", *[""] * (len(sheet.columns) - 1))
            lines.append(_markdown_row((row.engine, *(row.cells or absent))))
        lines += ["", *(line for note in sheet.notes for line in (note, ""))]
    lines += [line for one in not_measured(result, result.absent) for line in (one, "")]
    lines.append(machine(result))
    if result.noisy:
        lines += ["", noise(result)]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: tuple[str, ...]) -> str:
    plain = (" ".join(cell.split()).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(plain)} |"


def sheets(result: Result) -> Iterator[Sheet]:
    """Yield one table a workload, in the result's order, with all that is known of each engine.

    What is absent from all of them is not in them, but in :func:`not_measured`.
    """
    for workload in result.workloads:
        engines = [result.engines[measured.engine] for measured in workload.measurements]
        columns = [
            *_columns(workload, _threads(result) is None),
            *(_Column(column.heading, column.of_any_work) for column in _engine_columns(engines)),
        ]
        yield _sheet(result, workload, columns)


def _sheet(result: Result, workload: WorkloadResult, columns: Iterable[_Column]) -> Sheet:
    """Leave out the columns that no engine has; engines absent here alone come last."""
    labels = engine_labels(result)
    measured = [(result.engines[m.engine], m) for m in workload.measurements]
    known = [one for one in columns if any(one.cell(*pair) is not None for pair in measured)]
    rows = [
        Row(labels[m.engine], tuple(one.cell(engine, m) or "-" for one in known), m.wrong)
        for engine, m in measured
    ]
    rows += [Row(_absent_label(result, one), absent=one.reason) for one in workload.absent]
    headings = tuple(one.heading for one in known)
    return Sheet(_title(result, workload), headings, tuple(rows), _notes(result, workload))


def _columns(workload: WorkloadResult, threads_differ: bool) -> Iterator[_Column]:
    latency = LATENCY[workload.scenario]
    if threads_differ:
        yield _Column("threads", lambda engine, _: str(engine.threads))
    yield _Column("texts/s", lambda _, measured: rate_cell(measured.texts_per_s))
    for name in ("p50", "p99"):
        yield _Column(f"{name} {latency}", _milliseconds(f"{name}_ms"))
    yield _Column(RATIO, lambda _, measured: ratio_cell(measured))
    yield _Column("differs by", lambda _, measured: _difference(measured))
    yield _Column("accuracy", lambda _, measured: _percent(measured.accuracy, 1))
    yield _Column("roofline share", lambda _, measured: _percent(measured.roofline_share, 0))


def _engine_columns(engines: Sequence[Engine]) -> list[_EngineColumn]:
    columns = (
        _EngineColumn("peak MB", lambda engine: _megabytes(engine.peak_rss_bytes)),
        _EngineColumn("file MB", lambda engine: _megabytes(engine.file_bytes)),
        _EngineColumn("load s", lambda engine: f"{engine.load_s:.2f}"),
        _EngineColumn("cold start s", lambda engine: f"{engine.cold_start_s:.2f}"),
    )
    return [one for one in columns if any(one.cell(engine) is not None for engine in engines)]


def _milliseconds(field: str) -> Callable[[Engine, Measurement], str | None]:
    def cell(_: Engine, measured: Measurement) -> str | None:
        value = getattr(measured, field)
        return None if value is None else f"{value:,.2f}"

    return cell


def _percent(share: float | None, digits: int) -> str | None:
    return None if share is None else f"{100 * share:.{digits}f} %"


def _megabytes(size_bytes: int | None) -> str | None:
    return f"{size_bytes / 1e6:,.0f}" if size_bytes else None


def ratio_cell(measured: Measurement) -> str:
    """Return a ratio with its interval, or that it is the baseline."""
    ratio = measured.ratio
    if ratio is None:
        return "baseline"
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


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
        f"{100 * workload.padding_share:.0f} % padding",
        "" if threads is None else f"{threads} thread{'s' if threads > 1 else ''}",
        f"{rounds} rounds",
    )
    return f"{workload.name}: {', '.join(filter(None, facts))}"


def _threads(result: Result) -> int | None:
    """Return the number of threads that all engines have, or None where they differ."""
    numbers = {engine.threads for engine in result.engines}
    return numbers.pop() if len(numbers) == 1 else None


def _notes(result: Result, workload: WorkloadResult) -> tuple[str, ...]:
    labels = engine_labels(result)
    notes = []
    for what, is_so in SAID:
        measured = (m.engine for m in workload.measurements)
        if named := [labels[number] for number in measured if is_so(result.engines[number])]:
            notes.append(f"{what}: {', '.join(named)}.")
    for m in workload.measurements:
        if m.wrong:
            notes.append(f"{labels[m.engine]} is WRONG, so its speed means nothing: {_why(m)}.")
    return tuple(notes)


def _why(measured: Measurement) -> str:
    outputs = measured.outputs
    if outputs is None:
        return "its outputs could not be compared"
    return f"{outputs.why} ({outputs.max_abs:.1e})"


def rate_cell(per_s: float) -> str:
    """Return a rate with the digits that matter."""
    return f"{per_s:,.0f}" if per_s >= 20 else f"{per_s:.1f}"


def engine_labels(result: Result) -> list[str]:
    """Return what to call each engine, so that no two are called the same.

    Its name; where two share one, with the source; where threads differ, with those too.
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


def not_measured(result: Result, absent: Iterable[Absent]) -> list[str]:
    """Return one sentence a reason, with all that it keeps away."""
    labels: dict[str, list[str]] = {}
    for one in absent:
        labels.setdefault(one.reason, []).append(_absent_label(result, one))
    return [
        f"Not measured: {', '.join(dict.fromkeys(names))}: {reason}."
        for reason, names in labels.items()
    ]


def _absent_label(result: Result, absent: Absent) -> str:
    """Return the runtime's name, with the source where another source of it fared otherwise."""
    known = {engine.source for engine in result.engines if engine.runtime == absent.runtime}
    known |= {
        one.source
        for one in result.absent
        if one.runtime == absent.runtime and one.reason != absent.reason
    }
    return f"{absent.runtime} ({absent.source})" if known - {absent.source} else absent.runtime


def noise(result: Result) -> str:
    """Return one sentence on why timings deserve less trust; none: empty."""
    return f"Noisy: {'; '.join(result.noisy_because)}." if result.noisy else ""


def machine(result: Result) -> str:
    """Return one line on what it was measured on, with what, and when."""
    here = result.environment_before
    versions = [f"{name} {version}" for name, version in here.versions.items() if version]
    return (
        f"{here.processor} ({', '.join(here.flags) or 'no vector flags known'}), "
        f"{here.cores} cores, GPU {here.gpu}; Python {here.python}, "
        f"{', '.join(versions)}; {result.date:%Y-%m-%d}."
    )


def csv(result: Result) -> str:
    """Return one row a measurement with all its figures, in full precision and the JSON's units.

    A cell is empty where there is no figure. What is absent has a row too, with the reason in
    ``not_measured``.
    """
    written = io.StringIO()
    rows = list(_records(result))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv_module.DictWriter(written, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue()


def _records(result: Result) -> Iterator[dict[str, Any]]:
    for workload in result.workloads:
        work = {
            "workload": workload.name,
            "scenario": workload.scenario,
            "batch_size": workload.batch_size,
            "length": workload.length,
            "rate": workload.rate,
            "texts": workload.texts,
            "batches": workload.batches,
            "tokens": workload.tokens,
            "padding_share": workload.padding_share,
            "useful_flop": workload.useful_flop,
        }
        for measured in workload.measurements:
            yield work | _figures(result.engines[measured.engine], measured)
        for absent in (*workload.absent, *result.absent):
            yield work | {
                "runtime": absent.runtime,
                "source": absent.source,
                "not_measured": absent.reason,
            }


def _figures(engine: Engine, measured: Measurement) -> dict[str, Any]:
    ratio, outputs = measured.ratio, measured.outputs
    return {
        "engine": engine.name,
        "runtime": engine.runtime,
        "source": engine.source,
        "precision": engine.precision,
        "threads": engine.threads,
        "tokenises": engine.tokenises,
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
        "warm_up_stable": measured.warm_up.stable,
        "not_measured": "",
    }

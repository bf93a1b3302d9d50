"""A benchmark's plots as SVG: the points come from the result, the drawing is matplotlib's.

:func:`plots` gathers the points, with a 95% interval each, or says what is missing for a plot;
:func:`svg` draws one. An engine has one colour and one marker in all of them, and a line style a
number of threads. Wrong engines are in no plot: their speed means nothing.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from trainkit import svg as drawing
from trainkit.bench.measure.statistics import Interval, bootstrap_interval
from trainkit.bench.report.tables import engine_labels
from trainkit.bench.result import Measurement, Result, WorkloadResult
from trainkit.svg import COLOURS, plain_axes

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")
COLUMNS = 3


class PlotPoint(NamedTuple):
    """A value of y, or in a scatter of x, with its 95% interval."""

    x: float
    y: float
    low: float
    high: float


class Series(NamedTuple):
    """One engine's points, by x."""

    engine: int
    points: tuple[PlotPoint, ...]


class Panel(NamedTuple):
    """One pair of axes."""

    title: str
    series: tuple[Series, ...]


class Plot(NamedTuple):
    """Panels side by side; a ``scatter`` has unconnected points, whose interval is that of x."""

    title: str
    caption: str
    x_label: str
    y_label: str
    panels: tuple[Panel, ...]
    scatter: bool = False
    log_x: bool = True


class Missing(NamedTuple):
    """A plot that the result has no data for."""

    title: str
    reason: str


Value: TypeAlias = Callable[[WorkloadResult, Measurement], tuple[float, float, float] | None]
"""The value of one measurement, and the ends of its interval; None where it is not known."""


def plots(result: Result) -> list[Plot | Missing]:
    """Gather what there is to plot, in the order of the report."""
    return [_length(result), _batch(result), _load(result), _accuracy(result)]


def _length(result: Result) -> Plot | Missing:
    title = "Latency against length"
    grid = [work for work in result.workloads if work.scenario == "grid"]
    if len({work.length for work in grid}) < 2:
        return Missing(title, "it needs full batches of two lengths or more")
    sizes = sorted({work.batch_size for work in grid})
    panels = [
        Panel(
            f"batches of {size}",
            _series(
                [work for work in grid if work.batch_size == size],
                lambda work: float(work.length or 0),
                _batch_ms,
            ),
        )
        for size in sizes
    ]
    return Plot(
        title,
        "Full batches. The median time of a batch, over rounds.",
        "tokens per text",
        "ms per batch",
        tuple(panels),
    )


def _batch(result: Result) -> Plot | Missing:
    title = "Throughput against batch size"
    works = [work for work in result.workloads if work.scenario == "offline"]
    what = "The texts, in their order of arrival"
    if len({work.batch_size for work in works}) < 2:
        grid = [work for work in result.workloads if work.scenario == "grid"]
        longest = max((work.length or 0 for work in grid), default=0)
        works = [work for work in grid if work.length == longest]
        what = f"Full batches, {longest} tokens per text"
    if len({work.batch_size for work in works}) < 2:
        return Missing(title, "it needs two batch sizes or more")
    series = _series(works, lambda work: float(work.batch_size), _texts_per_s)
    return Plot(
        title,
        f"{what}. The median over rounds, without tokenisation.",
        "texts per batch",
        "texts/s",
        (Panel("", series),),
    )


def _load(result: Result) -> Plot | Missing:
    title = "Latency against load"
    works = [work for work in result.workloads if work.scenario == "server"]
    if len({work.rate for work in works}) < 2:
        return Missing(title, "it needs two rates of arriving requests or more")
    panels = []
    for percent in (50, 99):
        series = _series(works, lambda work: work.rate or 0.0, _percentile_ms(percent))
        if series:
            panels.append(Panel(f"p{percent}", series))
    if not panels:
        return Missing(title, "no sample of requests is large enough for a percentile")
    return Plot(
        title,
        "Single texts that arrive at random (Poisson); the time from when each was due to its "
        "answer. The interval is over rounds; a percentile that the sample does not carry is left "
        "out.",
        "requests/s",
        "ms since due",
        tuple(panels),
        log_x=False,
    )


def _accuracy(result: Result) -> Plot | Missing:
    title = "Accuracy against speed"
    fastest: dict[int, PlotPoint] = {}
    for work in result.workloads:
        if work.scenario != "offline":
            continue
        for measured in work.measurements:
            if measured.accuracy is None or measured.wrong:
                continue
            speed, low, high = _texts_per_s(work, measured)
            known = fastest.get(measured.engine)
            if known is None or known.x < speed:
                fastest[measured.engine] = PlotPoint(speed, 100 * measured.accuracy, low, high)
    if not fastest:
        return Missing(title, "it needs texts with labels")
    series = tuple(Series(engine, (point,)) for engine, point in sorted(fastest.items()))
    return Plot(
        title,
        "Each engine at its fastest batch size. The interval is that of the speed.",
        "texts/s",
        "accuracy, %",
        (Panel("", series),),
        scatter=True,
    )


def _series(
    works: Sequence[WorkloadResult], x: Callable[[WorkloadResult], float], value: Value
) -> tuple[Series, ...]:
    found: dict[int, list[PlotPoint]] = {}
    for work in sorted(works, key=x):
        for measured in work.measurements:
            known = None if measured.wrong else value(work, measured)
            if known is not None:
                found.setdefault(measured.engine, []).append(PlotPoint(x(work), *known))
    return tuple(Series(engine, tuple(points)) for engine, points in sorted(found.items()))


def _texts_per_s(work: WorkloadResult, measured: Measurement) -> tuple[float, float, float]:
    return _around(measured.texts_per_s, work.speeds(measured))


def _batch_ms(work: WorkloadResult, measured: Measurement) -> tuple[float, float, float]:
    medians = [1000 * one.median_s for one in measured.rounds]
    return _around(float(np.median(medians)), medians)


def _percentile_ms(percent: int) -> Value:
    """Return a function to a percentile of all batches, with its interval."""

    def value(_: WorkloadResult, measured: Measurement) -> tuple[float, float, float] | None:
        of_all: float | None = getattr(measured, f"p{percent}_ms")
        interval: Interval | None = getattr(measured, f"p{percent}_interval_ms")
        return None if of_all is None or interval is None else (of_all, *interval)

    return value


def _around(value: float, rounds: Sequence[float]) -> tuple[float, float, float]:
    """Return the value and its interval, which never leaves the value outside."""
    low, high = bootstrap_interval(rounds)
    return value, min(low, value), max(high, value)


def svg(plot: Plot, result: Result) -> bytes:
    """Draw a plot as an SVG document; the same result gives the same bytes."""
    return drawing.svg(_figure(plot, result))


def _figure(plot: Plot, result: Result) -> Figure:
    columns = min(COLUMNS, len(plot.panels))
    rows = -(-len(plot.panels) // columns)
    drawn = sorted({series.engine for panel in plot.panels for series in panel.series})
    legend_rows = -(-len(drawn) // 3)
    figure = Figure(figsize=(9, 3.5 * rows + 0.25 * legend_rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
    labels = engine_labels(result)
    for place, panel in zip(axes, plot.panels, strict=False):
        for series in panel.series:
            _draw(place, series, result, labels[series.engine], scatter=plot.scatter)
        _dress(place, panel, plot)
    for place in list(axes)[len(plot.panels) :]:
        place.set_visible(False)
    for row in range(rows):
        figure.axes[row * columns].set_ylabel(plot.y_label)
    handles = {
        label: handle
        for place in figure.axes
        for handle, label in zip(*place.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False
    )
    return figure


def _draw(axes: Axes, series: Series, result: Result, label: str, *, scatter: bool) -> None:
    colour, marker, line = _style(result, series.engine)
    points = series.points
    centre = [point.x if scatter else point.y for point in points]
    error = np.array(
        [
            [middle - point.low for middle, point in zip(centre, points, strict=True)],
            [point.high - middle for middle, point in zip(centre, points, strict=True)],
        ]
    )
    axes.errorbar(
        [point.x for point in points],
        [point.y for point in points],
        xerr=error if scatter else None,
        yerr=None if scatter else error,
        color=colour,
        marker=marker,
        markersize=8 if scatter else 5,
        linestyle="none" if scatter else line,
        linewidth=1.6,
        elinewidth=1,
        capsize=3,
        label=label,
    )


def _style(result: Result, number: int) -> tuple[str, str, str]:
    """Return colour and marker of what an engine is, and the line of its number of threads."""
    kinds = list(dict.fromkeys((engine.runtime, engine.source) for engine in result.engines))
    engine = result.engines[number]
    kind = kinds.index((engine.runtime, engine.source))
    threads = sorted({engine.threads for engine in result.engines}).index(engine.threads)
    # 7 colours and 8 markers have no common divisor: 56 engines differ in one of them or in both.
    colour, marker = COLOURS[kind % len(COLOURS)], MARKERS[kind % len(MARKERS)]
    return colour, marker, LINES[threads % len(LINES)]


def _dress(axes: Axes, panel: Panel, plot: Plot) -> None:
    """Give the axes their scales, ticks, grid and words."""
    values = [point for series in panel.series for point in series.points]
    axes.set_xlabel(plot.x_label)
    if panel.title:
        axes.set_title(panel.title, fontsize=10)
    if plot.scatter:
        axes.xaxis.set_major_locator(MaxNLocator(7))
        axes.set_xlim(left=0)
        middle = [point.y for point in values]
        margin = max(0.5, 0.2 * (max(middle) - min(middle)))
        axes.set_ylim(min(middle) - margin, max(middle) + margin)
        axes.margins(x=0.1)
    else:
        if plot.log_x:
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted({point.x for point in values}))
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.set_xlim(left=0)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    plain_axes(axes)


def _plain(value: float, _: int | None = None) -> str:
    return f"{value:,.10g}"

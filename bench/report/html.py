"""A benchmark's result as one HTML page: plots, tables, environment, method, and the JSON."""

from collections.abc import Iterator
from typing import Any

import msgspec

from trainkit.bench.measure.environment import Environment
from trainkit.bench.report.plots import Missing, plots, svg
from trainkit.bench.report.tables import engine_labels, machine, noise, not_measured, sheets
from trainkit.bench.result import Result
from trainkit.html import Block, Bullets, Code, Figure, Page, Section, render
from trainkit.tables import Table

METHOD = (
    "Each engine runs in a process of its own, alive and idle between its turns; turns are "
    "interleaved in rounds, in an order that rotates, after a warm-up.",
    "A workload ends when every engine has run for the least time and in the least number of "
    "rounds.",
    "Texts/s are the median over rounds. A ratio is that of two rates of one round, its median "
    "over rounds, with a 95% percentile bootstrap interval; above 1 is faster than the baseline, "
    "the first engine of its table.",
    "A percentile is given only if the sample is large enough for it. In the server scenario "
    "a request's time counts from when it was due.",
    "Outputs are compared with the baseline's in the same run; an engine outside of the tolerance "
    "is marked WRONG and is in no plot.",
)


def html(result: Result) -> str:
    """Return the whole page."""
    sections = (
        Section("Plots", [*_plots(result)]),
        Section("Tables", [*sheets(result), *not_measured(result, result.unavailable)]),
        Section("Engines", [_engines(result)]),
        Section("Environment", [_environment(result)]),
        Section("How it was measured", [*_method(result)]),
        Section("The result", ["All figures are in this page as JSON, in the element #result."]),
    )
    return render(
        Page(
            title=f"Benchmark: {result.data}, {result.date:%Y-%m-%d}",
            summary=machine(result),
            warning=noise(result),
            sections=sections,
            # No text in it can end the element around it.
            data=msgspec.json.encode(result).decode().replace("<", "\\u003c"),
        )
    )


def _plots(result: Result) -> Iterator[Block]:
    labels = engine_labels(result)
    wrong = {m.engine for work in result.workloads for m in work.measurements if m.wrong}
    if wrong:
        names = ", ".join(labels[engine] for engine in sorted(wrong))
        yield f"Left out where its outputs are wrong: {names}."
    for plot in plots(result):
        if isinstance(plot, Missing):
            yield f"{plot.title} is not drawn: {plot.reason}."
        else:
            yield Figure(svg(plot, result), f"{plot.caption} Bars are 95% intervals.", plot.title)


def _engines(result: Result) -> Table:
    rows = []
    for label, engine in zip(engine_labels(result), result.engines, strict=True):
        versions = ", ".join(f"{name} {version}" for name, version in engine.versions.items())
        fields = (engine.runtime, engine.source, engine.precision, str(engine.threads))
        rows.append((label, *fields, versions or "as below"))
    columns = ("engine", "runtime", "source", "precision", "threads", "versions")
    return Table(columns, rows, numeric=False)


def _environment(result: Result) -> Table:
    before, after = _described(result.environment), _described(result.environment_after)
    rows = [(name, before[name], after[name]) for name in before]
    return Table(("", "before", "after"), rows, numeric=False)


def _described(environment: Environment) -> dict[str, str]:
    """Return each field in words."""
    described = {}
    for name, value in msgspec.to_builtins(environment).items():
        words = _words(value)
        if name.endswith("_bytes") and isinstance(value, int):
            name, words = name.removesuffix("_bytes"), f"{value / 2**30:,.1f} GiB"
        described[name.replace("_", " ")] = words
    return described


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _method(result: Result) -> Iterator[Block]:
    settings = result.settings
    yield Code(" ".join(result.command))
    yield (
        f"At least {settings.min_seconds:g} s and {settings.min_rounds} rounds per engine and "
        f"workload; warm-up of at most {settings.warm_up_max_seconds:g} s; seed {settings.seed}."
    )
    yield Bullets(METHOD)
    for threads, flops in result.peak_flops.items():
        yield f"Peak of a float32 matrix product, {threads} threads: {flops / 1e9:,.0f} GFLOP/s."

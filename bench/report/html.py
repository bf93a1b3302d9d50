"""A benchmark's report as one HTML page that needs nothing else: no network, no script, no file.

Plots, tables, the environment, how it was measured, and the result itself as JSON, all from one
:class:`Result`.
"""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import msgspec

from trainkit.bench.measure.environment import Environment
from trainkit.bench.report.plots import Missing, Plot, plots, svg
from trainkit.bench.report.tables import Sheet, engine_labels, machine, noise, not_measured, sheets
from trainkit.bench.result import Result
from trainkit.page import document, framed, row, table

__all__ = ["html"]

METHOD = (
    "Each engine runs in a process of its own, alive and idle between its turns; turns are "
    "interleaved in rounds, in an order that rotates, after a warm-up.",
    "A workload ends when every engine has run for the least time and in the least number of "
    "rounds.",
    "Texts a second are the median over rounds. A ratio is that of two rates of one round, its "
    "median over rounds, with a 95 % percentile bootstrap interval; above 1 is faster than the "
    "baseline, the first engine of its table.",
    "A percentile is given only where the sample is large enough for it. In the server scenario "
    "a request's time counts from when it was due.",
    "Outputs are compared with the baseline's in the same run; an engine outside of the tolerance "
    "is marked WRONG and is in no plot.",
)


def html(result: Result) -> str:
    """Return the whole page."""
    title = f"Benchmark: {result.data}, {result.date:%Y-%m-%d}"
    body = [f"<h1>{escape(title)}</h1>", f'<p class="quiet">{escape(machine(result))}</p>']
    if result.noisy:
        body.append(f'<p class="noisy">{escape(noise(result))}</p>')
    body += ["<h2>Plots</h2>", *_plots(result)]
    body += ["<h2>Tables</h2>", *(part for sheet in sheets(result) for part in _sheet(sheet))]
    body += [f"<p>{escape(line)}</p>" for line in not_measured(result, result.absent)]
    body += ["<h2>Engines</h2>", table(*_engines(result), kind="scroll prose")]
    body += ["<h2>Environment</h2>", table(*_environment(result), kind="scroll prose")]
    body += ["<h2>How it was measured</h2>", *_method(result)]
    body += [
        "<h2>The result</h2>",
        "<p>All figures, raw samples too, are in this page as JSON, in the element "
        "<code>#result</code>.</p>",
        f'<script type="application/json" id="result">{_json(result)}</script>',
    ]
    return document(title, body)


def _json(result: Result) -> str:
    """Encode the result so that no text in it can end the element around it."""
    return msgspec.json.encode(result).decode().replace("<", "\\u003c")


def _plots(result: Result) -> Iterator[str]:
    labels = engine_labels(result)
    wrong = {m.engine for work in result.workloads for m in work.measurements if m.wrong}
    if wrong:
        names = ", ".join(labels[engine] for engine in sorted(wrong))
        yield f"<p>Left out where its outputs are wrong: {escape(names)}.</p>"
    for number, plot in enumerate(plots(result), start=1):
        yield f"<h3>{escape(plot.title)}</h3>"
        if isinstance(plot, Missing):
            yield f'<p class="quiet">Not drawn: {escape(plot.reason)}.</p>'
        else:
            yield _plot(plot, result, f"plot{number}")


def _plot(plot: Plot, result: Result, prefix: str) -> str:
    told = f"{plot.title}: {plot.y_label} against {plot.x_label}"
    return (
        f'<figure role="group" aria-label="{escape(told)}">{svg(plot, result, prefix)}'
        f"<figcaption>{escape(plot.caption)} Bars are 95 % intervals.</figcaption></figure>"
    )


def _sheet(sheet: Sheet) -> Iterator[str]:
    yield f"<h3>{escape(sheet.title)}</h3>"
    rows = []
    for line in sheet.rows:
        if line.absent:
            span = max(1, len(sheet.columns))
            reason = f'<td class="absent" colspan="{span}">not measured: {escape(line.absent)}</td>'
            rows.append(f"<tr><td>{escape(line.engine)}</td>{reason}</tr>")
        else:
            rows.append(row((line.engine, *line.cells), ' class="wrong"' if line.wrong else ""))
    yield framed(("engine", *sheet.columns), rows)
    yield from (f"<p>{escape(note)}</p>" for note in sheet.notes)


def _engines(result: Result) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    columns = ("engine", "runtime", "source", "precision", "threads", "versions")
    rows: list[tuple[str, ...]] = []
    for label, engine in zip(engine_labels(result), result.engines, strict=True):
        versions = ", ".join(f"{name} {version}" for name, version in engine.versions.items())
        fields = (engine.runtime, engine.source, engine.precision, str(engine.threads))
        rows.append((label, *fields, versions or "as below"))
    return columns, rows


def _environment(result: Result) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    before, after = _described(result.environment_before), _described(result.environment_after)
    return ("", "before", "after"), [(name, before[name], after[name]) for name in before]


def _described(environment: Environment) -> dict[str, str]:
    """Return each field in words, whatever fields there are."""
    said = {}
    for name, value in msgspec.to_builtins(environment).items():
        words = _words(value)
        if name.endswith("_bytes") and isinstance(value, int):
            name, words = name.removesuffix("_bytes"), f"{value / 2**30:,.1f} GiB"
        said[name.replace("_", " ")] = words
    return said


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _method(result: Result) -> Iterator[str]:
    settings = result.settings
    yield f"<p><code>{escape(' '.join(result.command))}</code></p>"
    yield (
        f"<p>At least {settings.min_seconds:g} s and {settings.min_rounds} rounds an engine and "
        f"workload; warm-up of at most {settings.warm_up_max_seconds:g} s; seed {settings.seed}."
        "</p>"
    )
    yield f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in METHOD)}</ul>"
    if result.roofline is None:
        yield "<p>The machine's peak was not measured.</p>"
        return
    for point in result.roofline.points:
        yield (
            f"<p>This machine's measured peak with {point.threads} "
            f"thread{'s' if point.threads > 1 else ''}: {point.gemm_flops_per_s / 1e9:,.0f} "
            f"GFLOP/s in a float32 matrix product, {point.bandwidth_bytes_per_s / 1e9:,.1f} GB/s "
            "of memory. A roofline share is the useful operations a second by that product's.</p>"
        )

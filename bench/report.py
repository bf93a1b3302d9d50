"""A benchmark's report as one HTML page that needs nothing else: no network, no script, no file.

Plots, tables, the environment, how it was measured, and the result itself as JSON, all from one
:class:`Result`.
"""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import msgspec

from trainkit.bench.environment import Environment
from trainkit.bench.plots import Missing, Plot, plots, svg
from trainkit.bench.result import Result
from trainkit.bench.tables import Sheet, engine_labels, machine, noise, sheets

__all__ = ["html"]

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  background: Canvas; color: CanvasText; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; } h3 { margin: 1.5rem 0 .25rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #8886;
  white-space: nowrap; }
th { border-bottom: 2px solid #888; }
th:first-child, td:first-child, td.absent { text-align: left; }
td.absent { white-space: normal; opacity: .75; }
.prose th, .prose td { white-space: normal; text-align: left; vertical-align: top; }
.prose td { min-width: 6rem; overflow-wrap: break-word; }
tr.wrong { color: #d00000; } @media (prefers-color-scheme: dark) { tr.wrong { color: #ff7b72; } }
figure { margin: 1.5rem 0; max-width: 60rem; } figure svg { width: 100%; height: auto; }
figcaption, .quiet { font-size: .9rem; opacity: .8; }
.noisy { border-left: .3rem solid #D55E00; padding: .5rem 1rem; background: #D55E0022; }
code { overflow-wrap: anywhere; }
"""
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
    body += ["<h2>Engines</h2>", _table(*_engines(result), kind="scroll prose")]
    body += ["<h2>Environment</h2>", _table(*_environment(result), kind="scroll prose")]
    body += ["<h2>How it was measured</h2>", *_method(result)]
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en">',
            '<head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style></head>",
            "<body>",
            *body,
            "<h2>The result</h2>",
            "<p>All figures, raw samples too, are in this page as JSON, in the element "
            "<code>#result</code>.</p>",
            f'<script type="application/json" id="result">{_json(result)}</script>',
            "</body></html>\n",
        )
    )


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
    for row in sheet.rows:
        if row.absent:
            span = max(1, len(sheet.columns))
            reason = f'<td class="absent" colspan="{span}">not measured: {escape(row.absent)}</td>'
            rows.append(f"<tr><td>{escape(row.engine)}</td>{reason}</tr>")
        else:
            rows.append(_row((row.engine, *row.cells), ' class="wrong"' if row.wrong else ""))
    yield _framed(("engine", *sheet.columns), rows)
    yield from (f"<p>{escape(note)}</p>" for note in sheet.notes)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "scroll") -> str:
    return _framed(columns, [_row(row) for row in rows], kind)


def _framed(columns: Sequence[str], rows: Sequence[str], kind: str = "scroll") -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    return (
        f'<div class="{kind}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(cells: Sequence[str], attributes: str = "") -> str:
    return f"<tr{attributes}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


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

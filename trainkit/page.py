"""The frame of a report: one HTML page that needs nothing else, no network, no script, no file."""

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["document", "framed", "row", "table"]

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


def document(title: str, body: Iterable[str]) -> str:
    """Return the whole page; ``title`` is text, ``body`` HTML."""
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
            "</body></html>\n",
        )
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "scroll") -> str:
    """Lay out cells of text; ``kind`` is "scroll" for figures or "scroll prose" for sentences."""
    return framed(columns, [row(cells) for cells in rows], kind)


def framed(columns: Sequence[str], rows: Iterable[str], kind: str = "scroll") -> str:
    """Put a head above ``rows``, which are HTML."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    return (
        f'<div class="{kind}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def row(cells: Sequence[str], attributes: str = "") -> str:
    """Return one row of cells of text."""
    return f"<tr{attributes}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"

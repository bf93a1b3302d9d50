"""Inline SVG for a report, drawn by matplotlib.

Text takes the colour of the page around it, so that it reads on light and dark.
"""

import io
import re
from collections.abc import Callable

import matplotlib as mpl
from matplotlib.figure import Figure

__all__ = ["COLOURS", "INK", "inline_svg"]

# Okabe and Ito's palette (2008), told apart with any colour vision; without black and yellow, which
# vanish on one of the two backgrounds.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#888888")
INK = "#010203"  # no other thing has this colour: it becomes the page's own


def inline_svg(draw: Callable[[], Figure], prefix: str) -> str:
    """Return the figure that ``draw`` makes; the same figure gives the same bytes.

    ``prefix`` makes its ids differ from those of other figures on the page.
    """
    with mpl.rc_context(
        {
            "svg.hashsalt": "trainkit",
            "svg.fonttype": "none",  # text stays text: it can be searched, read out and copied
            "font.family": "sans-serif",
            "font.size": 10,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    ):
        written = io.StringIO()
        draw().savefig(
            written, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    return _inline(written.getvalue(), prefix)


def _inline(document: str, prefix: str) -> str:
    """Return what may stand inside HTML: as wide as its place, in the page's font and ids its own.

    A style sheet inside it would be the whole page's.
    """
    drawing = document[document.index("<svg") :]
    drawing = re.sub(r"<(metadata|style).*?</\1>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{prefix}-", drawing)
    drawing = re.sub(r"font-family: [^;\"]*(; )?", "", drawing)
    head, rest = drawing.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    head += ' stroke-linejoin="round" stroke-linecap="butt"'
    return f"{head}>{rest}".replace(INK, "currentColor")

"""Plots for a report: matplotlib figures as SVG, with the reports' colours and axes."""

import io

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# The palette of Okabe and Ito (2008), which differs with any colour vision, without its yellow and
# black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#888888")


def svg(figure: Figure) -> bytes:
    """Return the figure as an SVG document; the same figure gives the same bytes."""
    written = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "trainkit", "svg.fonttype": "none", "font.size": 10}):
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return written.getvalue()


def plain_axes(axes: Axes) -> None:
    """Give axes a light grid and no frame."""
    axes.grid(color="#808080", alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)

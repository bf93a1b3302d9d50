"""The ranges of activations, from real texts: what static quantisation fixes beforehand.

Runs a float32 graph in ONNX Runtime with the inputs of its products as further outputs, and returns
a :class:`Range` for each of them.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trainkit.export.precision.observe import observe
from trainkit.export.precision.quantizable import Product, find_quantizable
from trainkit.serve.encoding import Batch
from trainkit.serve.errors import CheckFailedError
from trainkit.serve.types import FloatArray

BINS = 2048


class Range(msgspec.Struct, frozen=True):
    """The least and the largest value that an activation is expected to take."""

    low: float
    high: float

    def scale_and_zero_point(self) -> tuple[np.float32, np.uint8]:
        """Return the uint8 scale and zero point; zero, as padding has it, is always exact."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        scale = np.float32((high - low) / 255) or np.float32(1)
        return scale, np.uint8(np.rint(-low / scale))


def calibrate(
    model: ir.Model, batches: Sequence[Batch], scratch: Path, percentile: float = 100.0
) -> dict[str, Range]:
    """Return the range of every product's input over ``batches``, by the input's name.

    ``percentile`` of an input's values lie inside its range, the rest is cut off equally at both
    ends; at 100 it is the least and the largest value. ``scratch`` is a folder for the graph with
    its further outputs. Raises InputError without a batch,
    and CheckFailedError if an activation is NaN or infinite.
    """
    names = [
        str(site.node.inputs[0].name)
        for site in find_quantizable(model)
        if isinstance(site, Product) and site.node.inputs[0] is not None
    ]
    extremes = _extremes(observe(model, names, batches, scratch))
    if percentile == 100:
        return extremes
    counts = _histograms(observe(model, names, batches, scratch), extremes)
    return {name: _inside(counts[name], extremes[name], percentile) for name in extremes}


def _extremes(values: Iterator[tuple[str, FloatArray]]) -> dict[str, Range]:
    found: dict[str, Range] = {}
    for name, array in values:
        low, high = float(array.min()), float(array.max())
        if not np.isfinite([low, high]).all():
            raise CheckFailedError(
                f"the activation {name} is NaN or infinite on the texts of the calibration."
            )
        known = found.get(name, Range(low, high))
        found[name] = Range(min(low, known.low), max(high, known.high))
    return found


def _histograms(
    values: Iterator[tuple[str, FloatArray]], extremes: dict[str, Range]
) -> dict[str, npt.NDArray[np.int64]]:
    counts = {name: np.zeros(BINS, dtype=np.int64) for name in extremes}
    for name, array in values:
        limits = (extremes[name].low, extremes[name].high)
        counts[name] += np.histogram(array, bins=BINS, range=limits)[0]
    return counts


def _inside(counts: npt.NDArray[np.int64], extremes: Range, percentile: float) -> Range:
    """Cut half of what lies outside ``percentile`` off each end, whole bins at a time."""
    edges = np.linspace(extremes.low, extremes.high, BINS + 1)
    share = counts.cumsum() / counts.sum()
    tail = (100 - percentile) / 200
    first = int(np.searchsorted(share, tail, side="right"))
    last = int(np.searchsorted(share, 1 - tail, side="left"))
    return Range(float(edges[first]), float(edges[min(last, BINS - 1) + 1]))

"""Weights to bytes and a scale: the arithmetic of int8, in numpy, without a graph.

A float is ``(value - zero_point) * scale`` (Jacob et al. 2018, arXiv 1712.05877). Scales are
float32; K rows, N columns of a weight, V rows of an embedding table.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trainkit.export.precision.int8_settings import Int8Settings
from trainkit.serve.types import FloatArray

__all__ = ["QuantisedTable", "QuantisedWeight", "quantise_table", "quantise_weight"]


class QuantisedWeight(NamedTuple):
    """``values`` (K, N) int8 or uint8; ``scale`` and ``zero_point``, of that type, (N,) or ()."""

    values: npt.NDArray[np.int8] | npt.NDArray[np.uint8]
    scale: FloatArray
    zero_point: npt.NDArray[np.int8] | npt.NDArray[np.uint8]


class QuantisedTable(NamedTuple):
    """``values`` (V, H) int8, symmetric; ``scale`` (V, 1) or ()."""

    values: npt.NDArray[np.int8]
    scale: FloatArray


def quantise_weight(weight: FloatArray, settings: Int8Settings) -> QuantisedWeight:
    """Quantise a finite (K, N) weight as ``settings`` say."""
    axis = 0 if settings.per_channel else None
    if settings.signed:
        # 64, not 63, of 7 bits: 255 * 64 * 2 = 32640 still fits into 16 bits.
        limit = 127 if settings.weight_bits == 8 else 64
        scale = _scale(np.abs(weight).max(axis=axis), limit)
        values = np.clip(np.rint(weight / scale), -limit, limit).astype(np.int8)
        return QuantisedWeight(values, scale, np.zeros(scale.shape, dtype=np.int8))
    limit = 255 if settings.weight_bits == 8 else 127
    low = np.minimum(weight.min(axis=axis), 0)  # zero must have a value of its own
    scale = _scale(np.maximum(weight.max(axis=axis), 0) - low, limit)
    zero_point = np.rint(-low / scale)
    values = np.clip(np.rint(weight / scale) + zero_point, 0, limit).astype(np.uint8)
    return QuantisedWeight(values, scale, np.asarray(zero_point).astype(np.uint8))


def quantise_table(table: FloatArray, *, per_row: bool) -> QuantisedTable:
    """Quantise a finite (V, H) table of embeddings, symmetric about zero."""
    largest = np.abs(table).max(axis=1, keepdims=True) if per_row else np.abs(table).max()
    scale = _scale(largest, 127)
    return QuantisedTable(np.clip(np.rint(table / scale), -127, 127).astype(np.int8), scale)


def _scale(extent: npt.ArrayLike, steps: int) -> FloatArray:
    """Divide a range into steps; a range of nothing but zeros gets 1, for any scale fits it."""
    scale = np.asarray(extent, dtype=np.float32) / np.float32(steps)
    # Under the least normal number a scale's own rounding is no longer small.
    return np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale).astype(np.float32)

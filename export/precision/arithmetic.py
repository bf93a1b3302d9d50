"""The arithmetic of int8 in numpy: a float is ``value * scale`` (Jacob et al. 2018, 1712.05877).

Scales are float32. K rows and N columns of a weight; V rows of an embedding table.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trainkit.serve.types import FloatArray


class Quantised(NamedTuple):
    """``values``, int8 and symmetric about zero; ``scale``, float32: (N,), or (V, 1) of a table."""

    values: npt.NDArray[np.int8]
    scale: FloatArray


def quantise_weight(weight: FloatArray, bits: int) -> Quantised:
    """Quantise a finite (K, N) weight to 7 or 8 bits, with one scale per column."""
    # 64, not 63, of 7 bits: 255 * 64 * 2 = 32640 still fits into 16 bits.
    limit = 127 if bits == 8 else 64
    return _quantise(weight, np.abs(weight).max(axis=0), limit)


def quantise_table(table: FloatArray) -> Quantised:
    """Quantise a finite (V, H) table of embeddings, with one scale per row."""
    return _quantise(table, np.abs(table).max(axis=1, keepdims=True), 127)


def _quantise(array: FloatArray, largest: FloatArray, limit: int) -> Quantised:
    scale = largest.astype(np.float32) / np.float32(limit)
    # Any scale fits zeros; under the least normal number a scale's own rounding is not small.
    scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale).astype(np.float32)
    return Quantised(np.clip(np.rint(array / scale), -limit, limit).astype(np.int8), scale)

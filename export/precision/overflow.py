"""Which values of a float32 graph are too large for float16, on real texts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from trainkit.export.precision.fp32_nodes import LARGEST, find_fp32_nodes, infer_types
from trainkit.export.precision.observe import observe
from trainkit.serve.encoding import Batch

HEADROOM = 2  # other texts have larger values than the ones at hand
MASK = 1e38  # such values were put there to hide a score, and are limited by the conversion


def overflowing(model: ir.Model, batches: Sequence[Batch], scratch: Path) -> tuple[str, ...]:
    """Return the names of values over half of float16's range, for ``keep`` of ``to_fp16``.

    Only values that float16 would hold are looked at. ``scratch`` is a folder for files;
    ``InputError`` without a batch.
    """
    infer_types(model)
    kept = find_fp32_nodes(model).reasons
    names = [
        str(value.name)
        for node in model.graph
        if node not in kept
        for value in node.outputs
        if value.dtype == ir.DataType.FLOAT and value.uses()
    ]
    found = {
        name
        for name, array in observe(model, names, batches, scratch)
        if (np.abs(array[np.abs(array) < MASK]) > LARGEST / HEADROOM).any()
    }
    return tuple(name for name in dict.fromkeys(names) if name in found)

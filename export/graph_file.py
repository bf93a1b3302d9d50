"""An ONNX graph to its file, or to one for the graph and one for its weights. Needs no torch."""

from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir

# A protobuf message ends at 2 GiB; larger weights lie beside the graph.
INLINE_LIMIT_BYTES = 2**31 - 2**20


def save_graph(graph: ir.Model, path: Path, *, external_data: bool = False) -> None:
    """Write ``graph`` and check it with full checks.

    Weights over 2 GB, or any with ``external_data``, are written to ``path`` with ``.data``
    appended; a file of that name that is not needed is removed.
    """
    tensors = (value.const_value for value in graph.graph.initializers.values())
    weights_bytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    beside = external_data or weights_bytes > INLINE_LIMIT_BYTES
    external = f"{path.name}.data" if beside else None
    if external is None:
        # Weights may lie beside another file, which the new one must not point to.
        ir.external_data.load_to_model(graph)
    ir.save(graph, path, external_data=external)
    if external is None:
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)  # of a larger one before
    onnx.checker.check_model(path, full_check=True)


def operators(graph: ir.Model) -> dict[str, int]:
    """Count the nodes by operator."""
    return dict(Counter(node.op_type for node in graph.graph))

"""A graph in memory behind the one calling convention, without a file: proof between rewrites.

ONNX Runtime takes the weights from where they are. Written and read again, those of a base-size
model cost three seconds a stage.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir

from trainkit.serve.onnx_session import onnx_runner
from trainkit.serve.types import Runner

# Smaller ones stay in the graph: shapes and axes, which ONNX Runtime reads to infer shapes.
SMALLEST_BYTES = 4096


def graph_runner(graph: ir.Model, threads: int | None = None) -> Runner:
    """Open ``graph`` as it is now; what is changed afterwards does not reach the runner."""
    with _weights_outside(graph) as weights:
        skeleton = ir.to_proto(graph).SerializeToString()
    return onnx_runner(skeleton, threads=threads, weights=weights)


@contextmanager
def _weights_outside(graph: ir.Model) -> Iterator[dict[str, np.ndarray]]:
    """Point the graph's large weights to a file that is never read, and yield them by name."""
    kept = {}
    for name, value in graph.graph.initializers.items():
        tensor = value.const_value
        # numpy has no name for the others, such as bfloat16.
        if (
            tensor is not None
            and tensor.nbytes >= SMALLEST_BYTES
            and tensor.numpy().dtype.kind in "fiu"
        ):
            kept[name] = tensor
            value.const_value = ir.ExternalTensor(
                "weights",
                0,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=name,
            )
    try:
        yield {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in kept.items()}
    finally:
        for name, tensor in kept.items():
            graph.graph.initializers[name].const_value = tensor

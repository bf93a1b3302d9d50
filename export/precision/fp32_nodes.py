"""Which nodes of a graph must stay in float32 when the rest goes to float16, and why.

Four kinds do: sums and powers, whose values leave float16's range; what is computed from integers
alone (masks, positions, rotary angles: float16 counts exactly to 2048 only); scores that a mask is
added to, up to their softmax; and operators that ONNX does not define for float16.
"""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

LARGEST = 65504.0  # the largest finite float16

# Sums, and the arithmetic of norms around them. LayerNormalization, RMSNormalization, Softmax and
# Attention are not among them: their kernels add up in float32 for any input type.
SUMS = ("DFT", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "CumSum")
POWERS = ("Pow", "Sqrt", "Reciprocal", "Exp", "Log", "ReduceLogSum", "ReduceLogSumExp")
SENSITIVE = frozenset((*SUMS, *POWERS))
ELEMENTWISE = frozenset(("Add", "Sub", "Mul", "Div", "Max", "Min", "Neg", "Abs"))
LAYOUT = frozenset(("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Flatten"))
INTEGERS = "masks and positions are exact in float32"
MASKED = "a mask beyond float16's range is added here"


class Fp32Nodes(NamedTuple):
    """``reasons`` of the nodes that stay; ``mask_values`` are masks with values beyond float16."""

    reasons: dict[ir.Node, str]
    mask_values: set[ir.Value]


def infer_types(model: ir.Model) -> None:
    """Give every value of the main graph its type, in place.

    ONNX knows none of ONNX Runtime's own operators: what they return has the type of their first
    input, as all those have that stand between a classifier's inputs and its logits.
    """
    common.ShapeInferencePass()(model)
    for node in model.graph:
        first = node.inputs[0] if node.inputs else None
        if node.domain and first is not None and first.dtype is not None:
            for value in node.outputs:
                if value.dtype is None:
                    value.type = ir.TensorType(first.dtype)


def find_fp32_nodes(model: ir.Model, keep: Collection[str] = ()) -> Fp32Nodes:
    """Return which nodes of the main graph stay in float32, each with its reason.

    ``keep`` names values: a node that makes or reads one of them stays.
    """
    marks = _Marks(model.opset_imports.get("", 1), keep)
    for node in model.graph:
        reason = marks.reason(node)
        if reason is not None:
            marks.reasons[node] = reason
    return Fp32Nodes(marks.reasons, marks.mask_values)


class _Marks:
    """What is known of the nodes so far, in the graph's order."""

    def __init__(self, opset: int, keep: Collection[str]) -> None:
        self.opset = opset
        self.keep = keep
        self.reasons: dict[ir.Node, str] = {}
        self.from_integers: set[ir.Value] = set()
        self.mask_values: set[ir.Value] = set()
        self.masked: set[ir.Value] = set()

    def reason(self, node: ir.Node) -> str | None:
        """Return why ``node`` stays in float32, None if it need not."""
        values = (*node.inputs, *node.outputs)
        if any(value is not None and value.name in self.keep for value in values):
            return "its values leave float16's range on real texts"
        if self._computes_from_integers(node):
            return INTEGERS
        if self._adds_mask(node):
            return MASKED
        if node.domain == "" and node.op_type in SENSITIVE:
            return "a sum or power may leave float16's range"
        if node.domain == "" and not _allows_float16(node, self.opset):
            return "ONNX defines it for float32 only"
        return self._stands_between(node)

    def _computes_from_integers(self, node: ir.Node) -> bool:
        """Tell whether all that varies in a node's inputs is integers, or floats made of them.

        A lookup in a table of floats is none: what it gives is an embedding.
        """
        varying = _varying(node)
        if node.op_type.startswith("Gather") and node.inputs[0] not in varying:
            return False
        if not varying or not all(v in self.from_integers or _is_exact(v) for v in varying):
            return False
        self.from_integers.update(node.outputs)
        if any(v in self.mask_values or _is_beyond(v) for v in node.inputs):
            self.mask_values.update(node.outputs)
        return True

    def _adds_mask(self, node: ir.Node) -> bool:
        """Tell whether ``node`` is on the way from scores and a mask to the softmax of both.

        ``score - 3.4e38`` is ``-3.4e38`` in float32 for every score: a row that is masked as
        a whole becomes uniform. In float16 the score would still show beside the largest number.
        """
        if node.op_type in ("Add", "Sub"):
            found = any(value in self.mask_values or value in self.masked for value in node.inputs)
        else:
            found = node.op_type in LAYOUT | {"Softmax"} and node.inputs[0] in self.masked
        if found and node.op_type != "Softmax":
            self.masked.update(node.outputs)
        return found

    def _stands_between(self, node: ir.Node) -> str | None:
        """Keep simple arithmetic on values that are in float32 anyway: the epsilon of a norm."""
        if node.domain or node.op_type not in ELEMENTWISE:
            return None
        makers = [value.producer() for value in _varying(node)]
        if makers and all(maker in self.reasons for maker in makers):
            return "it stands between nodes in float32"
        return None


def _varying(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None and value.const_value is None]


def _is_exact(value: ir.Value) -> bool:
    return value.dtype is not None and (value.dtype.is_integer() or value.dtype == ir.DataType.BOOL)


def _is_beyond(value: ir.Value | None) -> bool:
    """Tell whether ``value`` is a lone float constant that float16 does not have."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return False
    array = value.const_value.numpy()
    return bool(value.dtype == ir.DataType.FLOAT and LARGEST < np.abs(array).max() < np.inf)


def _allows_float16(node: ir.Node, opset: int) -> bool:
    """Ask ONNX; a first output decides, the others may be statistics in float32 by definition."""
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    formal = (*schema.inputs, schema.outputs[0])
    allowed = (parameter.types for parameter in formal if "tensor(float)" in parameter.types)
    return all("tensor(float16)" in types for types in allowed)

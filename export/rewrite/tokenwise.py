"""Which operators treat each token by itself: a row is the vector along a value's last axis.

Choosing or re-ordering rows commutes with these operators.
"""

import onnx_ir as ir

from trainkit.export.rewrite.graph import MICROSOFT, attribute, dims, integers, same_rows, size

ELEMENTWISE = {
    *("Abs", "Cast", "Celu", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish"),
    *("Identity", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Selu"),
    *("Sigmoid", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh"),
    *("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Where"),
}
RUNTIME_ELEMENTWISE = {"Gelu", "FastGelu", "QuickGelu", "BiasGelu"}
NORMS = {"LayerNormalization", "RMSNormalization", "Softmax", "LogSoftmax"}
REDUCTIONS = {"ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2", "ReduceSumSquare"}


def tokenwise_inputs(node: ir.Node) -> list[int] | None:
    """Return which inputs hold the rows that the output's rows are made from, one from one.

    None if the operator mixes rows, or that is not known. All other inputs are constants that
    every row shares.
    """
    output = node.outputs[0]
    if len(node.outputs) != 1 or (known := dims(output)) is None or len(known) < 2:
        return None
    if node.domain == "" and node.op_type in ELEMENTWISE:
        return _elementwise(node)
    if node.domain == MICROSOFT and node.op_type in RUNTIME_ELEMENTWISE:
        return _elementwise(node)
    if node.domain == "" and (_product(node) or _over_last_axis(node, len(known))):
        first = node.inputs[0]
        return [0] if first is not None and same_rows(first, output) else None
    return None


def _elementwise(node: ir.Node) -> list[int] | None:
    """Sort the operands into rows and constants that all rows share; None if one is neither."""
    rows = []
    for index, value in enumerate(node.inputs):
        if value is None:
            continue
        if same_rows(value, node.outputs[0]):
            rows.append(index)
        elif not _shared(value):
            return None
    return rows or None


def _shared(value: ir.Value) -> bool:
    """Tell a constant of at most one row, of any rank."""
    if size(value) is None:
        return False
    known = dims(value)
    return known is not None and all(dim == 1 for dim in known[:-1])


def _product(node: ir.Node) -> bool:
    """Tell a product of rows with constant weights."""
    if node.op_type != "MatMul":
        return False
    return size(node.inputs[1]) is not None and len(dims(node.inputs[1]) or ()) == 2


def _over_last_axis(node: ir.Node, rank: int) -> bool:
    last = (-1, rank - 1)
    if node.op_type in NORMS:
        return attribute(node, "axis", -1) in last and all(
            value is None or _shared(value) for value in node.inputs[1:]
        )
    if node.op_type in REDUCTIONS:
        axes = attribute(node, "axes") or integers(node.inputs[1] if len(node.inputs) > 1 else None)
        return attribute(node, "keepdims", 1) == 1 and bool(axes) and set(axes or ()) <= set(last)
    return False

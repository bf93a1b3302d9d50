"""Compute ahead what does not depend on the inputs, and drop what computes nothing."""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

from trainkit.export.rewrite.base import RewriteResult
from trainkit.export.rewrite.graph import (
    SMALL,
    Builder,
    array,
    dims,
    infer_shapes,
    integers,
    producer,
    size,
)
from trainkit.export.rewrite.reshapes import unshaped

# Not `optimizer.optimize`: its rules take any number below 1e-8 for a zero, so that
# `variance + epsilon` of a LayerNorm loses its epsilon and a constant row becomes NaN.
RULES = (
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.materialize_reshape_shape_rule,
    rules.no_op_cast_rule,
    rules.no_op_transpose_rule,
    rules.reshape_reshape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
)
CLEANING = ir.passes.Sequential(
    RewritePass(RULES),
    common.RemoveUnusedNodesPass(),
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    common.DeduplicateInitializersPass(),
    common.CommonSubexpressionEliminationPass(),
    common.IdentityEliminationPass(),
    common.RemoveUnusedNodesPass(),
    common.RemoveUnusedOpsetsPass(),
    common.NameFixPass(),
)

# A weight over this many elements is only folded where that does not store it twice.
LARGE = 8192
# To fold these would undo a quantization.
KEPT = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
# What leaves the first operand as it is when the second is this number.
NEUTRAL = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}
ROUNDS = 8


def fold_constants(model: ir.Model) -> RewriteResult:
    """Fold constants; remove dead nodes, repeated subexpressions and operators without effect.

    Symbolic axes stay symbolic: the shapes of the graph's inputs are read, never assumed. A
    constant that is larger than what it is made from is left to be computed (``Expand``).
    """
    inlined = common.InlinePass()(model).modified
    before = len(model.graph)
    infer_shapes(model)
    for _ in range(ROUNDS):
        nodes = len(model.graph)
        optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=_worth_folding)
        _drop_neutral(model)
        _settle_sizes(model)
        _settle_slices(model)
        CLEANING(model)
        if len(model.graph) == nodes:
            break
    infer_shapes(model)
    folded = max(int(inlined), before - len(model.graph))
    declined = () if folded else ("nothing is left to fold",)
    return RewriteResult(name="fold_constants", rewritten=folded, declined=declined)


def _worth_folding(node: ir.Node) -> bool | None:
    """Fold a large constant too if this node alone reads it; None leaves it to the optimizer."""
    if node.op_type in KEPT:
        return False
    if node.op_type == "ConstantOfShape":
        sizes = integers(node.inputs[0])
        return True if sizes is not None and np.prod(sizes) <= SMALL else None
    large = [value for value in node.inputs if (size(value) or 0) > LARGE]
    if large and all(len(value.uses()) == 1 for value in large if value is not None):
        return True
    return None


def _drop_neutral(model: ir.Model) -> None:
    """Replace ``x + 0``, ``x - 0``, ``x * 1`` and ``x / 1`` by ``x``, for exactly that number."""
    for node in list(model.graph):
        if node.domain or node.op_type not in NEUTRAL or node.outputs[0].is_graph_output():
            continue
        first, second = node.inputs
        for value, other in ((first, second), (second, first)):
            if (
                _neutral(other, NEUTRAL[node.op_type])
                and value is not None
                and _covers(value, other)
            ):
                node.outputs[0].replace_all_uses_with(value)
                break
            if node.op_type in ("Sub", "Div"):
                break  # these do not commute


def _neutral(value: ir.Value | None, number: int) -> bool:
    return (
        size(value) == 1 and (found := array(value)) is not None and bool((found == number).all())
    )


def _covers(value: ir.Value, other: ir.Value | None) -> bool:
    """Tell whether ``other``, of one element, adds no axis to ``value``."""
    if other is None or other.shape is None:
        return False
    rank = len(other.shape)
    return rank == 0 or (value.shape is not None and len(value.shape) >= rank)


def _settle_sizes(model: ir.Model) -> None:
    """Where(sizes == -1, 1, sizes) -> sizes with 1 for each -1, which only constants can be.

    The older exporter writes this for every ``expand``, and hides a known axis with it.
    """
    for node in list(model.graph):
        if node.domain or node.op_type != "Where" or node.outputs[0].is_graph_output():
            continue
        condition, one, sizes = node.inputs
        equal = producer(condition, "Equal")
        if equal is None or sizes is None or equal.inputs[0] is not sizes:
            continue
        if set(integers(one) or ()) != {1} or set(integers(equal.inputs[1]) or ()) != {-1}:
            continue
        if (parts := producer(unshaped(sizes), "Concat")) is None:
            continue
        settled = [_settled(part, node) for part in parts.inputs]
        if all(part is not None for part in settled):
            made = Builder(node)("Concat", *settled, axis=0, shape=dims(sizes))
            node.outputs[0].replace_all_uses_with(made)


def _settled(part: ir.Value | None, before: ir.Node) -> ir.Value | None:
    """Return one size, 1 instead of -1; None if it may be -1 and is not known."""
    if (fixed := integers(part)) is not None:
        return Builder(before).constant([1 if size == -1 else size for size in fixed])
    value = part
    while node := producer(value, "Unsqueeze", "Squeeze", "Gather", "Slice", "Cast"):
        value = node.inputs[0]
    return part if producer(value, "Shape") is not None else None


def _settle_slices(model: ir.Model) -> None:
    """Slice(Shape(x)) -> the sizes themselves, where all that it takes are known.

    The older exporter reads the head size so, and hides the scale of every attention with it.
    """
    for node in list(model.graph):
        if node.domain or node.op_type != "Slice" or node.outputs[0].is_graph_output():
            continue
        shape = producer(node.inputs[0], "Shape")
        sizes = dims(shape.inputs[0]) if shape is not None and not shape.attributes else None
        bounds = [integers(value) for value in node.inputs[1:]]
        if sizes is None or len(bounds) < 2 or not all(bounds):  # before opset 10: attributes
            continue
        start, end, *others = (bound[0] for bound in bounds if bound)
        taken = sizes[start : end : others[1] if len(others) > 1 else 1]
        known = [length for length in taken if isinstance(length, int)]
        if known and len(known) == len(taken):
            node.outputs[0].replace_all_uses_with(Builder(node).constant(known))

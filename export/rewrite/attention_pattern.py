"""Find attention in a graph: the standard operator, or the operators that it consists of.

softmax(scale * Q K^T + mask) V of Vaswani et al. (2017), as exporters write it: the scale on
queries, keys or scores; the mask added as floats or chosen with Where; before or after it a guard
that gives zeros where every key is hidden.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from trainkit.export.rewrite.graph import Declined, array, attribute, dims, producer, scalar
from trainkit.export.rewrite.heads import swapped

# Added to any score of a real model, this gives exactly the same float32: as good as -infinity.
ABSORBING = -1e30


class Mask(NamedTuple):
    """What decides which keys are seen. B or 1, A or 1, L or 1 queries, K keys.

    ``visible`` is bool, ``hidden`` its opposite, ``added`` float; several may be added. A row of
    hidden keys alone gives zeros if ``zeros``, and otherwise the average of all values.
    """

    visible: ir.Value | None = None
    hidden: ir.Value | None = None
    added: tuple[ir.Value, ...] = ()
    zeros: bool = False


class AttentionPattern(NamedTuple):
    """One attention: its operands (B, A, L, D), and the node that gives its output."""

    node: ir.Node
    query: ir.Value
    key: ir.Value
    value: ir.Value
    scale: float
    mask: Mask


def find_attention(graph: ir.Graph) -> Iterator[ir.Node]:
    """Yield the Softmax nodes and four-axis Attention nodes of ``graph``."""
    for node in graph:
        if node.domain == "" and node.op_type == "Softmax":
            yield node
        elif node.domain == "" and node.op_type == "Attention":
            known = dims(node.inputs[0])
            if known is None or len(known) == 4:
                yield node


def match_attention(softmax: ir.Node) -> AttentionPattern | None:
    """Read the attention around a Softmax; None if it is none, ``Declined`` where it is odd."""
    if softmax.outputs[0].is_graph_output() or len(dims(softmax.outputs[0]) or ()) < 3:
        return None  # the probabilities of the labels, most likely
    weights, zeros = _after(softmax)
    product = _only_reader(weights)
    if product is None or product.op_type != "MatMul" or product.inputs[0] is not weights:
        raise Declined("the weights of an attention go elsewhere than to the product with values")
    scores, mask = _before(softmax.inputs[0])
    scale, scores = _strip_scale(scores)
    matmul = producer(scores, "MatMul")
    if matmul is None or array(matmul.inputs[1]) is not None:
        return None
    if attribute(softmax, "axis", -1) not in (-1, 3):
        raise Declined("a Softmax is not over the last axis")
    if len(dims(product.outputs[0]) or ()) != 4:
        raise Declined("attention heads do not have an axis of their own")
    query_scale, query = _strip_scale(matmul.inputs[0])
    key_scale, key = _strip_scale(matmul.inputs[1])
    keys = _keys(key)
    value = product.inputs[1]
    assert query is not None
    assert value is not None
    scale *= query_scale * key_scale
    inner_scale, keys = _strip_scale(keys)
    return AttentionPattern(
        product, query, keys, value, scale * inner_scale, _with_guard(mask, zeros)
    )


def _keys(value: ir.Value | None) -> ir.Value:
    """Return K (B, A, L, D) for K^T, as a value of the graph or a Transpose to be made."""
    if (found := swapped(value)) is not None:
        return found
    if (node := producer(value, "Transpose")) and attribute(node, "perm") == (0, 2, 3, 1):
        return _transposed(node)
    raise Declined("keys are not transposed in a way that is known")


def _transposed(node: ir.Node) -> ir.Value:
    """Put Transpose (B, L, A, D) to (B, A, L, D) beside the one that goes to (B, A, D, L)."""
    made = ir.node("Transpose", [node.inputs[0]], {"perm": [0, 2, 1, 3]})
    known = dims(node.inputs[0])
    made.outputs[0].type = node.outputs[0].type
    if known is not None:
        made.outputs[0].shape = ir.Shape([known[0], known[2], known[1], known[3]])
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_before(node, made)
    return made.outputs[0]


def _only_reader(value: ir.Value) -> ir.Node | None:
    readers = [node for node in value.consumers() if node.op_type != "Shape"]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def _strip_scale(value: ir.Value | None) -> tuple[float, ir.Value]:
    """Take multiplications with one number off ``value``: their product, and what they multiply."""
    factor = 1.0
    while node := producer(value, "Mul", "Div"):
        first, second = node.inputs
        if (number := scalar(second)) is not None:
            factor = factor * number if node.op_type == "Mul" else factor / number
            value = first
        elif node.op_type == "Mul" and (number := scalar(first)) is not None:
            factor, value = factor * number, second
        else:
            break
    assert value is not None
    return factor, value


def _before(value: ir.Value | None) -> tuple[ir.Value | None, Mask]:
    """Take the mask off the scores: what is under it, and the mask."""
    if node := producer(value, "Where"):
        condition, chosen, other = node.inputs
        if _absorbs(other):
            return chosen, Mask(visible=condition, zeros=_infinite(other))
        if _absorbs(chosen):
            return other, Mask(hidden=condition, zeros=_infinite(chosen))
        raise Declined("hidden scores are replaced by a number that is not low enough")
    added: list[ir.Value] = []
    while node := producer(value, "Add"):
        first, second = node.inputs
        assert first is not None
        assert second is not None
        if _holds_scores(first):
            value = first
            added.append(second)
        elif _holds_scores(second):
            value = second
            added.append(first)
        else:
            break
    return value, Mask(added=tuple(added))


def _holds_scores(value: ir.Value) -> bool:
    """Tell the product of queries and keys, perhaps scaled or masked, from a mask."""
    while node := producer(value, "Mul", "Div", "Add"):
        first, second = node.inputs
        if first is None or second is None:
            return False
        if node.op_type == "Add":
            return _holds_scores(first) or _holds_scores(second)
        value = second if scalar(first) is not None else first
    node = producer(value, "MatMul")
    return node is not None and array(node.inputs[1]) is None and len(dims(value) or ()) == 4


def _absorbs(value: ir.Value | None) -> bool:
    number = scalar(value)
    return number is not None and number <= ABSORBING


def _infinite(value: ir.Value | None) -> bool:
    """True for -infinity, which makes a row without visible keys NaN: zeros are as right."""
    return scalar(value) == -np.inf


def _after(softmax: ir.Node) -> tuple[ir.Value, ir.Node | None]:
    """Return the weights that meet the values, and the Where that zeroes hidden ones, if any."""
    weights = softmax.outputs[0]
    for node in weights.consumers():
        if node.op_type == "Where" and not weights.is_graph_output():
            return node.outputs[0], node
    return weights, None


def _with_guard(mask: Mask, guard: ir.Node | None) -> Mask:
    """Add what a Where after the softmax says about rows without a visible key."""
    mask = _as_bool(mask)
    if guard is None:
        return mask
    condition, chosen, other = guard.inputs
    if producer(condition, "IsNaN"):
        if scalar(chosen) != 0:
            raise Declined("NaN weights are replaced by something else than zero")
        if mask.added and not all(_finite(value) for value in mask.added):
            raise Declined("a float mask may hold -infinity, and a guard makes its rows zero")
        return mask
    if mask.visible is not None and condition is mask.visible and scalar(other) == 0:
        return mask._replace(zeros=True)
    if mask.hidden is not None and condition is mask.hidden and scalar(chosen) == 0:
        return mask._replace(zeros=True)
    raise Declined("weights are chosen by another mask than the scores")


def _as_bool(mask: Mask) -> Mask:
    """Read an added Where(visible, 0, -infinity) as the bool mask that it is."""
    if len(mask.added) != 1 or (node := producer(mask.added[0], "Where")) is None:
        return mask
    condition, chosen, other = node.inputs
    if scalar(chosen) == 0 and _absorbs(other):
        return Mask(visible=condition, zeros=_infinite(other))
    if scalar(other) == 0 and _absorbs(chosen):
        return Mask(hidden=condition, zeros=_infinite(chosen))
    return mask


def _finite(value: ir.Value) -> bool:
    found = array(value)
    return found is not None and bool(np.isfinite(found).all())

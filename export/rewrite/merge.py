"""Queries, keys and values in one product."""

from collections import defaultdict
from collections.abc import Iterable
from math import prod
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from trainkit.export.rewrite.base import RewriteResult
from trainkit.export.rewrite.graph import (
    Builder,
    Declined,
    array,
    attribute,
    dims,
    drop_unused,
    infer_shapes,
    opset,
    size,
)
from trainkit.export.rewrite.reshapes import RESHAPES

__all__ = ["merge_qkv"]


class Linear(NamedTuple):
    """x W + b with constants W (K, N) and b (N) or None, as MatMul and Add."""

    product: ir.Node
    output: ir.Value
    weight: ir.Value
    bias: ir.Value | None


Group = list[Linear]
Merged = dict[tuple[object, ...], ir.Value]
"""What was made already, by what from: layers that share their weights (ALBERT) go on sharing."""


def merge_qkv(model: ir.Model) -> RewriteResult:
    """x Wq + bq, x Wk + bk, x Wv + bv -> x [Wq Wk Wv] + [bq bk bv], split into three.

    Three products of one input, or the two that give one attention its keys and values.
    """
    if opset(model) < 13:
        return RewriteResult(name="merge_qkv", rewritten=0, declined=("the opset is below 13",))
    infer_shapes(model)
    rewritten, declined = 0, set()
    merged: Merged = {}
    groups = [group for group in _groups(model.graph) if len(group) > 2 or _one_attention(group)]
    together = {id(linear.product): _weights(group) for group in groups for linear in group}
    for group in groups:
        try:
            _check(group, together)
        except Declined as reason:
            declined.add(str(reason))
            continue
        _merge(group, merged)
        rewritten += 1
    if not groups:
        declined.add("no three products with constant weights have one input")
    drop_unused(model)
    return RewriteResult(name="merge_qkv", rewritten=rewritten, declined=tuple(sorted(declined)))


def _groups(graph: ir.Graph) -> Iterable[Group]:
    by_input: dict[tuple[ir.Value | None, bool], Group] = defaultdict(list)
    for node in graph:
        if node.domain == "" and node.op_type == "MatMul" and _is_matrix(node.inputs[1]):
            linear = _linear(node)
            by_input[node.inputs[0], linear.bias is None].append(linear)
    return by_input.values()


def _is_matrix(value: ir.Value | None) -> bool:
    return size(value) is not None and len(dims(value) or ()) == 2


def _linear(product: ir.Node) -> Linear:
    """Take the bias along, where that is all that the product's output is for."""
    weight, output = product.inputs[1], product.outputs[0]
    assert weight is not None
    readers = list(output.consumers())
    if len(readers) == 1 and readers[0].op_type == "Add" and not output.is_graph_output():
        bias = next((value for value in readers[0].inputs if value is not output), None)
        if bias is not None and size(bias) is not None and dims(bias) == (dims(weight) or ())[1:]:
            return Linear(product, readers[0].outputs[0], weight, bias)
    return Linear(product, output, weight, None)


def _weights(group: Group) -> tuple[ir.Value | None, ...]:
    return tuple(value for linear in group for value in (linear.weight, linear.bias))


def _one_attention(group: Group) -> bool:
    """Tell two products that are keys and values of one attention."""
    return len(group) == 2 and bool(_attentions(group[0].output) & _attentions(group[1].output))


def _attentions(value: ir.Value) -> set[int]:
    """Return the attention nodes that read ``value``, perhaps laid out in another way first."""
    found = set()
    for node, index in value.uses():
        if node.op_type in ("Attention", "MultiHeadAttention") and index in (1, 2):
            found.add(id(node))
        elif node.op_type in ("Reshape", "Gather", "Squeeze", "Unsqueeze", "Concat"):
            found |= (
                _attentions(node.outputs[0]) if index == 0 or node.op_type == "Concat" else set()
            )
    return found


def _check(group: Group, together: dict[int, tuple[ir.Value | None, ...]]) -> None:
    if any(linear.output.is_graph_output() for linear in group):
        raise Declined("a product is an output of the graph")
    if len({linear.weight.dtype for linear in group}) > 1:
        raise Declined("the weights of one input have different dtypes")
    for linear in group:
        for node in linear.weight.consumers():
            if together.get(id(node)) != _weights(group):
                raise Declined("a weight is used elsewhere too, and would have to be stored twice")


def _merge(group: Group, merged: Merged) -> None:
    first = group[0].product
    build = Builder(first)
    x = first.inputs[0]
    assert x is not None
    widths = [int((dims(linear.weight) or ())[1] or 0) for linear in group]
    shape = [*(dims(x) or ())[:-1], sum(widths)] if dims(x) else None
    weight = _joined([linear.weight for linear in group], merged, build)
    total = build("MatMul", x, weight, shape=shape)
    biases = [linear.bias for linear in group if linear.bias is not None]
    if biases:
        total = build("Add", total, _joined(biases, merged, build), shape=shape)
    if not _gathered(group, total, widths[0], merged):
        _split(group, total, widths, build)


def _split(group: Group, total: ir.Value, widths: list[int], build: Builder) -> None:
    leading = (dims(total) or ())[:-1]
    parts = build.several(
        len(group),
        "Split",
        total,
        widths,
        shapes=[[*leading, width] if leading else None for width in widths],
        axis=-1,
    )
    for linear, part in zip(group, parts, strict=True):
        linear.output.replace_all_uses_with(part)


def _gathered(group: Group, total: ir.Value, width: int, merged: Merged) -> bool:
    """Let the Gathers that unpack queries, keys and values take them out of the one product too.

    As rows of ``width``, token t's part i is row parts * t + i: no Split has to copy.
    """
    found = (_gather(linear.output, width) for linear in group)
    gathers = [gather for gather in found if gather is not None]
    if len(gathers) < len(group) or len({gather.inputs[1] for gather in gathers}) > 1:
        return False
    for number, gather in enumerate(gathers):
        data, slot = gather.inputs
        assert slot is not None
        build = Builder(gather)
        row = [dim for dim in (dims(data) or ())[1:] if isinstance(dim, int)]
        gather.replace_input_with(0, build("Reshape", total, [-1, *row], shape=[None, *row]))
        gather.replace_input_with(1, _places(slot, len(group), number, merged, build))
    return True


def _gather(value: ir.Value, width: int) -> ir.Node | None:
    """Return the Gather of tokens, ``width`` numbers each, that alone reads ``value``."""
    while len(value.uses()) == 1 and not value.is_graph_output():
        node = next(iter(value.consumers()))
        if node.domain or node.inputs[0] is not value:
            return None
        if node.op_type == "Gather":
            row = (dims(value) or ())[1:]
            numbers = [dim for dim in row if isinstance(dim, int)]
            whole = len(numbers) == len(row) > 0 and prod(numbers) == width
            return node if whole and attribute(node, "axis", 0) == 0 else None
        if node.op_type not in RESHAPES:
            return None
        value = node.outputs[0]
    return None


def _places(slot: ir.Value, parts: int, number: int, merged: Merged, build: Builder) -> ir.Value:
    """Return parts * slot + number, the same value for the same three."""
    dtype = (slot.dtype or ir.DataType.INT64).numpy()
    if (slot, parts) not in merged:
        merged[slot, parts] = build("Mul", slot, build.constant(parts, dtype), shape=dims(slot))
    first = merged[slot, parts]
    if number == 0:
        return first
    if (slot, parts, number) not in merged:
        added = build("Add", first, build.constant(number, dtype), shape=dims(slot))
        merged[slot, parts, number] = added
    return merged[slot, parts, number]


def _joined(values: list[ir.Value], merged: Merged, build: Builder) -> ir.Value:
    key = tuple(values)
    if key not in merged:
        arrays = [array(value) for value in values]
        content = np.concatenate([found for found in arrays if found is not None], axis=-1)
        merged[key] = build.weights(f"{values[0].name}.merged", content)
    return merged[key]

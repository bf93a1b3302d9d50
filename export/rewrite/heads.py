"""Attention heads on an axis of their own, traced back to one vector a token.

B batch, L tokens, A heads, D head size, H = A * D. Attention in plain operators runs on
(B, A, L, D); the fused operators take (B, L, H), of which the former is a reshape and a transpose.
"""

from typing import NamedTuple

import onnx_ir as ir

from trainkit.export.rewrite.graph import (
    Builder,
    Declined,
    array,
    attribute,
    dims,
    integers,
    producer,
)

HEADS_FIRST = [0, 2, 1, 3]  # (B, L, A, D) to (B, A, L, D), and back


class Heads(NamedTuple):
    """How many heads there are, and how long each one's vectors."""

    number: int
    size: int


def swapped(value: ir.Value | None) -> ir.Value | None:
    """Return x where ``value`` is x with its last two of four axes exchanged; None otherwise.

    Either one Transpose, or what the exporter writes for keys: Reshape to (B * A, L, D), Transpose,
    Reshape to (B, A, D, L).
    """
    if (node := producer(value, "Transpose")) and attribute(node, "perm") == (0, 1, 3, 2):
        return node.inputs[0]
    outer = producer(value, "Reshape")
    middle = producer(outer.inputs[0], "Transpose") if outer else None
    inner = producer(middle.inputs[0], "Reshape") if middle else None
    if outer is None or middle is None or inner is None:
        return None
    if tuple(attribute(middle, "perm", ())) != (0, 2, 1):
        return None
    before, after = dims(inner.inputs[0]), dims(value)
    if before is None or len(before) != 4:
        return None
    if _exchanges(inner, outer) or after == (*before[:2], before[3], before[2]):
        return inner.inputs[0]
    return None


def _exchanges(inner: ir.Node, outer: ir.Node) -> bool:
    """Tell from the exporter's shape arithmetic that ``outer`` restores the leading axes of x.

    Inner shape: (-1, L, D), outer shape: (leading axes, D, L), each cut from Shape(x).
    """
    flat, whole = producer(inner.inputs[1], "Concat"), producer(outer.inputs[1], "Concat")
    if flat is None or whole is None or len(flat.inputs) != 3 or len(whole.inputs) != 3:
        return False
    first, length, width = flat.inputs
    leading = producer(whole.inputs[0], "Slice")
    if leading is None or list(whole.inputs[1:]) != [width, length] or integers(first) != [-1]:
        return False
    shape = producer(leading.inputs[0], "Shape")
    bounds = [integers(value) for value in leading.inputs[1:3]]
    if shape is None or shape.inputs[0] is not inner.inputs[0] or bounds[1] != [-2]:
        return False
    return bounds[0] is not None and bounds[0][0] in (0, -(2**63))


def find_heads(value: ir.Value) -> Heads:
    """Return A and D of a (B, A, L, D) value; ``Declined`` where they are not known numbers."""
    known = dims(value)
    if known is None or len(known) != 4:
        raise Declined("the attention's operands do not have four axes (batch, head, token, size)")
    count, width = known[1], known[3]
    if isinstance(width, int) and not isinstance(count, int):
        count = _count(value, width)
    if not isinstance(count, int) or not isinstance(width, int):
        raise Declined("the number of heads is not a known number")
    return Heads(count, width)


def _count(value: ir.Value, width: int) -> int | None:
    """Divide the hidden size before the split into heads by ``width``."""
    transpose = producer(value, "Transpose")
    split = producer(transpose.inputs[0], "Reshape") if transpose else None
    before = dims(split.inputs[0]) if split else None
    after = dims(split.outputs[0]) if split else None
    if before is None or after is None or len(before) != 3 or before[:2] != after[:2]:
        return None
    return before[2] // width if isinstance(before[2], int) else None


def tokens(value: ir.Value, heads: Heads, build: Builder) -> ir.Value:
    """Return (B, L, H) for a (B, A, L, D) value; ``Declined`` where it is not split from such.

    A prefix is joined to keys and values here as well: ``Concat`` of trained constants, expanded to
    the batch, with the text's own.
    """
    if producer(value, "Transpose") is not None:
        return _merge_heads(value, heads, build)
    if (concat := producer(value, "Concat")) and attribute(concat, "axis") in (2, -2):
        parts = [tokens(part, heads, build) for part in concat.inputs if part is not None]
        shape = _shape(value, heads)
        return build("Concat", *parts, axis=1, shape=shape)
    if (expand := producer(value, "Expand")) and array(expand.inputs[0]) is not None:
        return _expanded(expand, heads, build)
    raise Declined(
        "queries, keys or values are not split into heads by Reshape and Transpose alone "
        "(rotary positions, for one, stand between)"
    )


def _shape(value: ir.Value, heads: Heads) -> list[int | str | None]:
    known = dims(value) or (None, None, None, None)
    return [known[0], known[2], heads.number * heads.size]


def _merge_heads(value: ir.Value, heads: Heads, build: Builder) -> ir.Value:
    transpose = value.producer()
    assert transpose is not None
    split = transpose.inputs[0]
    if list(attribute(transpose, "perm", ())) != HEADS_FIRST or split is None:
        raise Declined("queries, keys or values are transposed in another way than heads are")
    shape = _shape(value, heads)
    reshape = producer(split, "Reshape")
    before = dims(reshape.inputs[0]) if reshape else None
    if reshape and before is not None and None not in shape and before == tuple(shape):
        assert reshape.inputs[0] is not None
        return reshape.inputs[0]
    if reshape and (target := _joined(reshape.inputs[1], heads, build)) is not None:
        return build("Reshape", reshape.inputs[0], target, shape=shape)
    # 0 keeps the axis of the input.
    return build("Reshape", split, [0, 0, heads.number * heads.size], shape=shape)


def _joined(target: ir.Value | None, heads: Heads, build: Builder) -> ir.Value | None:
    """Return [B, L, H] for the shape [B, L, A, D], where that is put together from its parts."""
    concat = producer(target, "Concat")
    if concat is None or len(concat.inputs) != 4:
        return None
    if integers(concat.inputs[0]) is not None or integers(concat.inputs[1]) is not None:
        return None  # a constant -1 or 0 would change its meaning
    size = build.constant([heads.number * heads.size])
    for reader in concat.inputs[0].consumers() if concat.inputs[0] is not None else ():
        if reader.op_type == "Concat" and list(reader.inputs) == [*concat.inputs[:2], size]:
            return reader.outputs[0]
    joined = ir.node("Concat", [*concat.inputs[:2], size], {"axis": 0})
    joined.outputs[0].dtype, joined.outputs[0].shape = ir.DataType.INT64, ir.Shape([3])
    build.graph.insert_after(concat, joined)
    return joined.outputs[0]


def _expanded(expand: ir.Node, heads: Heads, build: Builder) -> ir.Value:
    """Lay out trained keys or values (A, P, D) as (1, P, H), and expand those to the batch."""
    constant, shape = expand.inputs
    found = array(constant)
    assert found is not None
    assert constant is not None
    if found.ndim < 3 or found.size != found.shape[-2] * heads.number * heads.size:
        raise Declined("a constant among the keys or values does not have one vector a head")
    merged = found.reshape(heads.number, -1, heads.size).transpose(1, 0, 2)
    merged = merged.reshape(1, -1, heads.number * heads.size)
    weights = build.weights(f"{constant.name}.tokens", merged)
    batch = build("Slice", shape, [0], [1], shape=[1])
    sizes = build("Concat", batch, [1], [1], axis=0, shape=[3])
    return build("Expand", weights, sizes, shape=_shape(expand.outputs[0], heads))

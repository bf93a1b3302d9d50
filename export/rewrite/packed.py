"""Read the packed layout off a graph: real tokens only, (1, T, H), between two Gathers.

``keep`` (B * S) says which flat positions are kept, ``index`` (T) is where they are,
``slot`` (B * S) the kept token at or before each position; see
:class:`trainkit.models.attention.MaskPlan`. Packing is a Gather by ``index``, unpacking one by
``slot``. At kept positions one undoes the other; position 0 of every row is always kept.
"""

from typing import NamedTuple

import onnx_ir as ir

from trainkit.export.rewrite.graph import Builder, attribute, dims, integers, producer, scalar
from trainkit.export.rewrite.reshapes import RESHAPES, unshaped


class PackingPlan(NamedTuple):
    """The packing of one batch: ``keep`` with axes (B, S), and the slot of each flat position."""

    keep: ir.Value
    slot: ir.Value

    def first_slots(self, before: ir.Node) -> ir.Value:
        """Return the slot of position 0 of each row, (B); the graph must be sorted afterwards."""
        build = Builder(before)
        sizes = build("Shape", self.keep, shape=[2], dtype=ir.DataType.INT64)
        rows = build("Reshape", self.slot, sizes, shape=dims(self.keep))
        return build("Gather", rows, build.constant(0), axis=1, shape=(dims(self.keep) or ())[:1])


class Packed(NamedTuple):
    """A change of layout: the last node of it, and the first, which reads what is changed."""

    node: ir.Node
    reader: ir.Node
    plan: PackingPlan


def read_pack(node: ir.Node) -> Packed | None:
    """Read (B, S, H) to (1, T, H): Reshape, Gather by ``index``, Reshape."""
    gather, reader = _ends(node)
    if gather is None or reader is None or len(dims(node.outputs[0]) or ()) != 3:
        return None
    kept = _kept_by_index(gather.inputs[1])
    return _packed(node, reader, kept, dims(reader.inputs[0]))


def read_unpack(node: ir.Node) -> Packed | None:
    """Read (1, T, H) to (B, S, H): Reshape, Gather by ``slot``, Reshape."""
    gather, reader = _ends(node)
    if gather is None or reader is None or len(dims(node.outputs[0]) or ()) != 3:
        return None
    return _packed(node, reader, _kept_by_slot(gather.inputs[1]), dims(node.outputs[0]))


def _ends(node: ir.Node) -> tuple[ir.Node | None, ir.Node | None]:
    """Find the Gather under the Reshapes of ``node``, and the first node of the Reshapes below."""
    if node.domain or node.op_type not in RESHAPES:
        return None, None
    gather = producer(unshaped(node.outputs[0]), "Gather")
    if gather is None or attribute(gather, "axis", 0) != 0 or not _alone(node.inputs[0], gather):
        return None, None
    if len(dims(gather.outputs[0]) or ()) < 2 or len(dims(gather.inputs[1]) or ()) != 1:
        return None, None
    reader = producer(gather.inputs[0], *RESHAPES)
    while reader is not None and (above := producer(reader.inputs[0], *RESHAPES)) is not None:
        reader = above
    if reader is None or len(dims(reader.inputs[0]) or ()) != 3:
        return None, None
    return gather, reader if _alone(gather.inputs[0], reader) else None


def _alone(value: ir.Value | None, until: ir.Node) -> bool:
    """Tell whether ``value``, and all up to the output of ``until``, is read once only."""
    while value is not None:
        if len(value.uses()) != 1 or value.is_graph_output():
            return False
        node = value.producer()
        if node is None or node is until:
            return node is until
        value = node.inputs[0]
    return False


def _packed(
    node: ir.Node,
    reader: ir.Node,
    kept: tuple[ir.Value, ir.Value] | None,
    padded: tuple[int | str | None, ...] | None,
) -> Packed | None:
    """Check that rows of ``keep`` are rows of the batch, and that it keeps the first position."""
    if kept is None or padded is None:
        return None
    keep = unshaped(kept[0])
    if dims(keep) != padded[:2] or None in padded[:2] or not _keeps_first(keep):
        return None
    return Packed(node, reader, PackingPlan(keep, kept[1]))


def _kept_by_slot(slot: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """Read CumSum(keep) - 1: ``keep`` flat, and the slots."""
    if slot is None or (minus := producer(unshaped(slot), "Sub")) is None:
        return None
    counts = producer(minus.inputs[0], "CumSum")
    cast = producer(counts.inputs[0], "Cast") if counts else None
    if counts is None or cast is None or scalar(minus.inputs[1]) != 1 or cast.inputs[0] is None:
        return None
    if integers(counts.inputs[1]) != [0] or attribute(counts, "reverse", 0):
        return None
    return None if attribute(counts, "exclusive", 0) else (cast.inputs[0], slot)


def _kept_by_index(index: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """Read NonZero(keep): ``keep`` flat, and the slots that belong to it."""
    if index is None:
        return None
    value = unshaped(index)
    if (transpose := producer(value, "Transpose")) is not None and transpose.inputs[0] is not None:
        value = unshaped(transpose.inputs[0])
    found = producer(value, "NonZero")
    if found is None or found.inputs[0] is None or len(dims(found.inputs[0]) or ()) != 1:
        return None
    return found.inputs[0], value


def _keeps_first(keep: ir.Value) -> bool:
    """Read mask OR (position == 0), position counted along the last axis."""
    either = producer(keep, "Or")
    for value in either.inputs if either is not None else ():
        equal = producer(value, "Equal")
        for one, other in (equal.inputs, equal.inputs[::-1]) if equal is not None else ():
            counted = producer(one, "Range")
            if counted is not None and scalar(other) == 0 and scalar(counted.inputs[0]) == 0:
                return scalar(counted.inputs[2]) == 1
    return False

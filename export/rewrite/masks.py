"""Attention masks in the form that the fused operators take; each made once, not once a layer.

B batch, A heads, L queries, K keys.
"""

import numpy as np
import onnx_ir as ir

from trainkit.export.rewrite.attention_pattern import Mask
from trainkit.export.rewrite.graph import Builder, dims
from trainkit.export.rewrite.heads import HEADS_FIRST, Heads

LOWEST = float(np.finfo(np.float32).min)


class Masks:
    """The masks of one graph of opset ``version``, by what they were made from."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.made: dict[tuple[object, ...], ir.Value] = {}

    def as_bools(self, mask: Mask, query: ir.Value, build: Builder) -> ir.Value:
        """Return the mask as bools, True for a key that is seen, for all of ``query`` (B, L, H)."""
        return self._for_all_queries(self._visible(mask, build), query, build)

    def as_floats(self, mask: Mask, query: ir.Value, build: Builder) -> ir.Value | None:
        """Return the mask as floats to be added, for all queries; None if there is none."""
        if mask.added:
            return self._for_all_queries(self._sum(mask.added, build), query, build)
        condition = mask.visible if mask.visible is not None else mask.hidden
        if condition is None:
            return None
        key = ("float", condition, mask.visible is None)
        if key not in self.made:
            zero, lowest = (build.constant(number, np.float32) for number in (0.0, LOWEST))
            chosen = (zero, lowest) if mask.visible is not None else (lowest, zero)
            self.made[key] = build(
                "Where", condition, *chosen, shape=dims(condition), dtype=ir.DataType.FLOAT
            )
        return self._for_all_queries(self.made[key], query, build)

    def zero_unseen(self, context: ir.Value, heads: Heads, mask: Mask, build: Builder) -> ir.Value:
        """Multiply (B, L, H) with 1 for each query that sees a key and 0 for others."""
        visible = self.as_bools(mask, context, build)
        known = dims(visible)
        one_for_all = known is not None and len(known) == 4 and known[1] == 1
        key = ("seen", visible)
        if key not in self.made:
            rows = self._any_key(visible, build)
            if known is not None and one_for_all:  # (B, 1, L, 1) to (B, L, 1)
                seen = build("Reshape", rows, [0, -1, 1], shape=[known[0], known[2], 1])
            else:  # (B, A or 1, L, 1) to (B, L, A or 1, 1)
                seen = build("Transpose", rows, perm=HEADS_FIRST)
            self.made[key] = seen
        if one_for_all:
            return build("Mul", context, self.made[key], shape=dims(context))
        split = build("Reshape", context, [0, 0, heads.number, heads.size])
        masked = build("Mul", split, self.made[key])
        return build("Reshape", masked, [0, 0, heads.number * heads.size], shape=dims(context))

    def _any_key(self, visible: ir.Value, build: Builder) -> ir.Value:
        numbers = build("Cast", visible, to=ir.DataType.FLOAT, dtype=ir.DataType.FLOAT)
        # Axes are an attribute up to opset 17, an input from then on.
        if self.version < 18:
            return build("ReduceMax", numbers, axes=[3])
        return build("ReduceMax", numbers, [3])

    def _visible(self, mask: Mask, build: Builder) -> ir.Value:
        if mask.visible is not None:
            return mask.visible
        assert mask.hidden is not None
        key = ("not", mask.hidden)
        if key not in self.made:
            self.made[key] = build("Not", mask.hidden, shape=dims(mask.hidden))
        return self.made[key]

    def _sum(self, added: tuple[ir.Value, ...], build: Builder) -> ir.Value:
        key = ("sum", *added)
        if key not in self.made:
            total = added[0]
            for other in added[1:]:
                total = build("Add", total, other)
            self.made[key] = total
        return self.made[key]

    def _for_all_queries(self, mask: ir.Value, query: ir.Value, build: Builder) -> ir.Value:
        """Give the mask one row a query: the operators' CPU kernels take no (B, 1, 1, K)."""
        known, (batch, length, _) = dims(mask), dims(query) or (None, None, None)
        if length not in (None, 1) and known is not None and len(known) == 4 and known[2] == length:
            return mask
        # The same number in every layer under any name of the axis; a fixed number is another.
        key = ("queries", mask, length if isinstance(length, int) else None)
        if key not in self.made:
            sizes = build("Shape", query, shape=[3], dtype=ir.DataType.INT64)
            queries, one = build("Slice", sizes, [1], [2], shape=[1]), build.constant([1])
            shape, rows = None, one
            if known is not None and len(known) == 4:
                shape = [known[0], known[1], length, known[3]]
                if known[0] != 1:  # so that the axis is known to be the batch
                    shape[0], rows = batch, build("Slice", sizes, [0], [1], shape=[1])
            target = build("Concat", rows, one, queries, one, axis=0, shape=[4])
            self.made[key] = build("Expand", mask, target, shape=shape)
        return self.made[key]

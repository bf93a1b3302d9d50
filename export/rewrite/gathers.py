"""A token at a time is moved as one row of numbers, straight to where it is wanted.

Packing and unpacking are Gathers over tokens. Written by heads, each stands between two Reshapes:
no data is moved by those, but an operator costs microseconds, and a short text has little else.
B batch, S sequence, T tokens, A heads, D head size, H = A * D.
"""

from math import prod
from typing import NamedTuple

import onnx_ir as ir

from trainkit.export.rewrite.base import RewriteResult
from trainkit.export.rewrite.graph import (
    Builder,
    attribute,
    dims,
    drop_unused,
    infer_shapes,
    producer,
)
from trainkit.export.rewrite.reshapes import RESHAPES, unshaped

__all__ = ["gather_rows"]


class _Site(NamedTuple):
    """``last`` gives its axes to what ``gather`` took from ``source``, in rows of ``width``."""

    last: ir.Node
    gather: ir.Node
    source: ir.Value
    width: int


Made = dict[tuple[ir.Value, object], ir.Value]
"""What was made already, by what from: all layers gather by the same places."""


def gather_rows(model: ir.Model) -> RewriteResult:
    """reshape(Gather(reshape(x), i)) -> Gather(x as rows, i reshaped), one H numbers a token.

    (T, A, D) by (B * S) places and then as (B, S, H) is (T, H) by (B, S) places.
    """
    infer_shapes(model)
    made: Made = {}
    rewritten = 0
    for node in list(model.graph):
        if (site := _read(node)) is not None:
            _apply(site, made)
            rewritten += 1
    drop_unused(model)
    declined = () if rewritten else ("no Gather over tokens stands before a Reshape of its rows",)
    return RewriteResult(name="gather_rows", rewritten=rewritten, declined=declined)


def _read(node: ir.Node) -> _Site | None:
    """Read a Reshape to (T, H) or (B, S, H) of whole rows of a Gather, which nothing else reads."""
    after = dims(node.outputs[0])
    if node.domain or node.op_type != "Reshape" or node.outputs[0].is_graph_output():
        return None
    if after is None or len(after) not in (2, 3):
        return None
    gather = producer(unshaped(node.outputs[0]), "Gather")
    if gather is None or attribute(gather, "axis", 0) != 0 or not _alone(node.inputs[0], gather):
        return None
    data, places = gather.inputs
    assert data is not None
    row = [dim if isinstance(dim, int) else 0 for dim in (dims(data) or ())[1:]]
    if not row or prod(row) != after[-1] or len(dims(places) or ()) != 1:
        return None
    # Whole rows already, and one Reshape with them: as good as a Reshape of the places.
    if len(row) < 2 and any(isinstance(dim, int) for dim in after[:-1]):
        return None
    return _Site(node, gather, unshaped(data), prod(row))


def _alone(value: ir.Value | None, gather: ir.Node) -> bool:
    """Tell whether ``value``, up to the output of ``gather``, is read once only."""
    while value is not None and len(value.uses()) == 1 and not value.is_graph_output():
        node = value.producer()
        if node is gather:
            return True
        value = node.inputs[0] if node is not None and node.op_type in RESHAPES else None
    return False


def _apply(site: _Site, made: Made) -> None:
    after, places = dims(site.last.outputs[0]), site.gather.inputs[1]
    assert after is not None
    assert places is not None
    rows = _rows(site, made)
    build = Builder(site.last)
    if len(after) == 3:
        places = _places(places, site.last.inputs[1], after[:-1], build, made)
    gathered = build("Gather", rows, places, axis=0, shape=after)
    site.last.outputs[0].replace_all_uses_with(gathered)


def _rows(site: _Site, made: Made) -> ir.Value:
    """Return ``source`` as (T, H), once for all that is gathered from it."""
    _, gather, source, width = site
    if (dims(source) or ())[1:] == (width,):
        return source
    if (source, width) not in made:
        made[source, width] = Builder(gather)("Reshape", source, [-1, width], shape=[None, width])
    return made[source, width]


def _places(
    places: ir.Value,
    target: ir.Value | None,
    axes: tuple[int | str | None, ...],
    build: Builder,
    made: Made,
) -> ir.Value:
    """Return ``places`` on the first two axes of a Reshape to ``target``."""
    assert target is not None
    if (target, "leading") not in made:
        made[target, "leading"] = build("Slice", target, [0], [2], shape=[2])
    if (places, target) not in made:
        made[places, target] = build("Reshape", places, made[target, "leading"], shape=axes)
    return made[places, target]

"""Tokens on one axis: what treats each token by itself needs no batch axis.

On (tokens, H) ONNX Runtime computes a product and its bias in one Gemm, and leaves residual Add,
LayerNormalization and Gelu alone; on (B, S, H) it fuses them into SkipLayerNormalization and
BiasGelu, which on a CPU take two to three times as long as the parts.
"""

from collections.abc import Iterable

import onnx_ir as ir

from trainkit.export.rewrite.base import RewriteResult
from trainkit.export.rewrite.graph import (
    Builder,
    array,
    attribute,
    dims,
    drop_unused,
    infer_shapes,
    integers,
)
from trainkit.export.rewrite.reshapes import merge_reshapes
from trainkit.export.rewrite.tokenwise import tokenwise_inputs

Region = dict[ir.Node, list[int]]
"""Nodes that treat each token by itself, with the inputs that hold tokens."""


def flatten_tokens(model: ir.Model) -> RewriteResult:
    """f(x) -> reshape(f(reshape(x))), for all that f does to each token by itself.

    Counts the products with constant weights that work on two axes now.
    """
    infer_shapes(model)
    regions = [region for region in _regions(model.graph) if _products(region)]
    for region in regions:
        _flatten(region)
    if regions:
        model.graph.sort()
        infer_shapes(model)
        merge_reshapes(model)
    drop_unused(model)
    count = sum(map(_products, regions))
    declined = () if count else ("no product with constant weights works on three axes",)
    return RewriteResult(name="flatten_tokens", rewritten=count, declined=declined)


def _products(region: Region) -> int:
    return sum(node.op_type == "MatMul" for node in region)


def _regions(graph: ir.Graph) -> Iterable[Region]:
    """Group the nodes on three axes whose tokens are handed from one to the other."""
    candidates: Region = {}
    for node in graph:
        rows, output = tokenwise_inputs(node), node.outputs[0]
        # A branch of an If would see the reshape only if it stood there.
        fixed = any(reader.graph is not graph for reader in output.consumers())
        if rows and len(dims(output) or ()) == 3 and not (fixed or output.is_graph_output()):
            candidates[node] = rows
    group: dict[ir.Node, Region] = {}
    for node, rows in candidates.items():
        joined: Region = {node: rows}
        for row in rows:
            value = node.inputs[row]
            above = value.producer() if value is not None else None
            if above in group:
                joined = {**group[above], **joined}
        for member in joined:
            group[member] = joined
    order = {node: place for place, node in enumerate(candidates)}
    regions = {id(region): region for region in group.values()}.values()
    return [dict(sorted(region.items(), key=lambda item: order[item[0]])) for region in regions]


def _flatten(region: Region) -> None:
    """Put one reshape at every edge of the region, and let it work on (tokens, H)."""
    flat: dict[ir.Value, ir.Value] = {}
    shapes = {node.outputs[0]: dims(node.outputs[0]) for node in region}
    source, targets = _source(region), dict[int | str | None, ir.Value]()
    for node, rows in region.items():
        for index, value in enumerate(node.inputs):
            if value is None or value in shapes:
                continue
            if index in rows or len(dims(value) or ()) > 2:
                node.replace_input_with(index, _flat(value, flat, node))
        _use_last_axis(node)
    for output, shape in shapes.items():
        assert shape is not None
        output.shape = ir.Shape([None, shape[2]])
        outside = [use for use in output.uses() if use.node not in region]
        if outside:
            whole = _whole(output, shape, source, targets, outside[0].node)
            for use in outside:
                use.node.replace_input_with(use.idx, whole)


def _source(region: Region) -> ir.Value:
    """Return the value on three axes that the region begins with: no node of it stands before."""
    for node, rows in region.items():
        for row in rows:
            value = node.inputs[row]
            if value is not None and value.producer() not in region:
                return value
    raise AssertionError("a graph without a beginning")


def _flat(value: ir.Value, flat: dict[ir.Value, ir.Value], before: ir.Node) -> ir.Value:
    """Return ``value`` as (tokens, H); a constant stays one."""
    if value not in flat:
        width = (dims(value) or ())[-1]
        build = Builder(before)
        if (found := array(value)) is not None:
            flat[value] = build.weights(f"{value.name}.flat", found.reshape(-1, found.shape[-1]))
        elif isinstance(width, int):
            flat[value] = build("Reshape", value, [-1, width], shape=[None, width])
        else:
            flat[value] = build("Flatten", value, axis=2)
    return flat[value]


def _whole(
    output: ir.Value,
    shape: tuple[int | str | None, ...],
    source: ir.Value,
    targets: dict[int | str | None, ir.Value],
    before: ir.Node,
) -> ir.Value:
    """Return a flat ``output`` on the three axes that it had, those of ``source``."""
    build = Builder(before)
    fixed = [dim if isinstance(dim, int) else -1 for dim in shape]
    if fixed.count(-1) <= 1:
        return build("Reshape", output, fixed, shape=shape)
    width = shape[2]
    if width not in targets:
        sizes = build("Shape", source, shape=[3], dtype=ir.DataType.INT64)
        leading = build("Slice", sizes, [0], [2], shape=[2])
        last = [width if isinstance(width, int) else -1]
        targets[width] = build("Concat", leading, last, axis=0, shape=[3])
    return build("Reshape", output, targets[width], shape=shape)


def _use_last_axis(node: ir.Node) -> None:
    """Name the last axis -1: its number changes."""
    if attribute(node, "axis") == 2:
        node.attributes.add(ir.AttrInt64("axis", -1))
    if attribute(node, "axes") is not None:
        node.attributes.add(ir.AttrInt64s("axes", [-1]))
    elif node.op_type.startswith("Reduce") and integers(node.inputs[1]) == [2]:
        node.replace_input_with(1, Builder(node).constant([-1]))

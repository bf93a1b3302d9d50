"""The last layer only for the token that the head takes.

Choosing tokens commutes with every operator that treats each token by itself, and in attention it
narrows the queries alone. So the choice moves up from the head, through the last layer, to the
queries of its attention; keys and values stay whole. B batch, S sequence, T packed tokens.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias

import onnx_ir as ir

from trainkit.export.rewrite.base import RewriteResult
from trainkit.export.rewrite.graph import (
    MICROSOFT,
    Builder,
    Declined,
    attribute,
    dims,
    drop_unused,
    infer_shapes,
    integers,
)
from trainkit.export.rewrite.packed import Packed, read_pack, read_unpack
from trainkit.export.rewrite.reshapes import merge_reshapes
from trainkit.export.rewrite.tokenwise import tokenwise_inputs

Layout: TypeAlias = Literal["padded", "packed"]
Use: TypeAlias = tuple[ir.Node, int]

# Of the operators that take queries, keys and values as their first three inputs.
MASK_INPUT = {("", "Attention"): 3, (MICROSOFT, "MultiHeadAttention"): 5}


class Region(NamedTuple):
    """The nodes that need to work on chosen tokens only, and what they read.

    ``uses`` has, for each input of the region that holds tokens, the layout of these tokens.
    """

    uses: dict[Use, Layout]
    nodes: list[ir.Node]
    attentions: list[ir.Node]
    packs: list[Packed]
    unpacks: list[Packed]


def narrow_last_layer(model: ir.Model) -> RewriteResult:
    """f(Attention(Q, K, V))[:, i] -> f(Attention(Q[:, i], K, V)), f row by row."""
    infer_shapes(model)
    rewritten, declined = 0, set()
    for choice in list(_choices(model.graph)):
        try:
            _narrow(model, choice)
            rewritten += 1
        except Declined as reason:
            declined.add(str(reason))
    if not rewritten and not declined:
        declined.add("the head does not take one token at a fixed position; it pools them all")
    if rewritten:
        model.graph.sort()
        merge_reshapes(model)
    drop_unused(model)
    return RewriteResult(
        name="narrow_last_layer", rewritten=rewritten, declined=tuple(sorted(declined))
    )


def _choices(graph: ir.Graph) -> Iterator[ir.Node]:
    """Yield each ``states[:, i]`` with a constant i: states (B, S, H)."""
    for node in graph:
        if node.domain or node.op_type not in ("Gather", "Slice"):
            continue
        known = dims(node.inputs[0])
        if known is None or len(known) != 3 or isinstance(known[1], int) or _index(node) is None:
            continue
        if node.inputs[0] is not None and node.inputs[0].producer() is not None:
            yield node


def _index(node: ir.Node) -> int | None:
    """Return i for ``states[:, i]``, None for other choices."""
    if node.op_type == "Gather":
        index = integers(node.inputs[1])
        return index[0] if index and len(index) == 1 and attribute(node, "axis", 0) == 1 else None
    if len(node.inputs) < 4:  # all axes, or before opset 10 attributes
        return None
    starts, ends, axes, *steps = (integers(value) for value in node.inputs[1:])
    if axes != [1] or starts is None or ends is None or steps not in ([], [[1]]):
        return None
    return starts[0] if ends[0] == starts[0] + 1 and ends[0] != 0 else None


def _narrow(model: ir.Model, choice: ir.Node) -> None:
    index = _index(choice)
    assert index is not None
    region = _grow(model.graph, choice)
    if not region.attentions:
        raise Declined(
            "between the last attention and the head's token stands " + _obstacle(region)
        )
    if region.unpacks and index != 0:
        raise Declined("the head takes another token than the first, which packing may drop")
    _apply(region, choice, index)
    infer_shapes(model)


def _grow(graph: ir.Graph, choice: ir.Node) -> Region:
    """Go up from the choice as long as a node's output is used for chosen tokens alone."""
    region = Region({(choice, 0): "padded"}, [], [], [], [])
    for node in reversed(graph):
        layouts = {
            region.uses.get((use.node, use.idx)) for value in node.outputs for use in value.uses()
        }
        if len(layouts) != 1 or any(value.is_graph_output() for value in node.outputs):
            continue
        if (layout := layouts.pop()) is not None:
            _take(node, layout, region)
    return region


def _take(node: ir.Node, layout: Layout, region: Region) -> None:
    """Add ``node`` to the region, if it can work on chosen tokens."""
    if (rows := tokenwise_inputs(node)) is not None:
        region.nodes.append(node)
        region.uses.update({(node, row): layout for row in rows})
    elif layout == "padded" and _takes_queries(node):
        if not attribute(node, "is_causal", 0) and not attribute(node, "unidirectional", 0):
            region.attentions.append(node)
            region.uses[node, 0] = "padded"
    elif layout == "packed" and (pack := read_pack(node)) is not None:
        region.packs.append(pack)
        region.uses[pack.reader, 0] = "padded"
    elif layout == "padded" and (unpack := read_unpack(node)) is not None:
        region.unpacks.append(unpack)
        region.uses[unpack.reader, 0] = "packed"


def _takes_queries(node: ir.Node) -> bool:
    """Tell an attention whose keys and values are inputs of their own."""
    if (node.domain, node.op_type) not in MASK_INPUT:
        return False
    return len(node.inputs) >= 3 and None not in node.inputs[:3]


def _obstacle(region: Region) -> str:
    """Name the operator at which the way up ends."""
    reasons = []
    for node, row in region.uses:
        value = node.inputs[row]
        above = value.producer() if value is not None else None
        if above is None or above in region.nodes:
            continue
        if tokenwise_inputs(above) is None:
            return f"{above.op_type}, which does not treat each token by itself"
        reasons.append(f"{above.op_type}, whose output is needed for all tokens")
    return reasons[0] if reasons else "no operator at all"


def _apply(region: Region, choice: ir.Node, index: int) -> None:
    """Put the choice at the region's upper edge, and let the region work on chosen tokens."""
    inside = {id(node) for node in (*region.nodes, *region.attentions)}
    inside |= {id(packed.node) for packed in (*region.packs, *region.unpacks)}
    chosen: dict[tuple[ir.Value, Layout], ir.Value] = {}
    for (node, row), layout in region.uses.items():
        value = node.inputs[row]
        above = value.producer() if value is not None else None
        if value is None or (above is not None and id(above) in inside):
            continue
        if (value, layout) not in chosen:
            at = _positions(region, layout, index, node)
            shape = dims(value)
            made = Builder(node)(
                "Gather",
                value,
                at,
                axis=1,
                shape=[*_leading(shape, layout), shape[-1]] if shape else None,
            )
            chosen[value, layout] = made
        node.replace_input_with(row, chosen[value, layout])
    for node in region.attentions:
        _narrow_mask(node, index)
    for node in (*region.nodes, *region.attentions):
        _forget_tokens(node)
    _rejoin(region)
    _choose_only(choice)


def _leading(shape: tuple[int | str | None, ...] | None, layout: Layout) -> list[int | str | None]:
    if shape is None:
        return []
    return [shape[0], 1] if layout == "padded" else [1, None]


def _positions(region: Region, layout: Layout, index: int, before: ir.Node) -> ir.Value:
    if layout == "padded":
        return Builder(before).constant([index])
    return region.unpacks[0].plan.first_slots(before)


def _narrow_mask(node: ir.Node, index: int) -> None:
    """Keep the mask's row of the one query: (B, 1, S, K) to (B, 1, 1, K)."""
    place = MASK_INPUT[node.domain, node.op_type]
    mask = node.inputs[place] if len(node.inputs) > place else None
    if mask is None:
        return
    known = dims(mask)
    if known is not None and len(known) == 4 and known[2] == 1:
        return
    rows = Builder(node)(
        "Gather", mask, [index], axis=2 if known is None or len(known) == 4 else len(known) - 2
    )
    if known is not None:
        rows.shape = ir.Shape([*known[:-2], 1, known[-1]])
    node.replace_input_with(place, rows)


def _forget_tokens(node: ir.Node) -> None:
    """Let shape inference find the new number of tokens; it does not know every operator."""
    for value in node.outputs:
        known = dims(value)
        value.shape = None
        if _takes_queries(node) and known is not None:
            value.shape = ir.Shape([known[0], 1, known[2]])


def _rejoin(region: Region) -> None:
    """One token per row needs no packing: (B, 1, H) is (1, B, H) in memory."""
    for layout, packed in (
        *((([1, -1]), pack) for pack in region.packs),
        *((([-1, 1]), unpack) for unpack in region.unpacks),
    ):
        output = packed.node.outputs[0]
        source = packed.reader.inputs[0]
        width = (dims(output) or ())[-1]
        assert isinstance(width, int)
        made = Builder(packed.node)("Reshape", source, [*layout, width])
        output.replace_all_uses_with(made)


def _choose_only(choice: ir.Node) -> None:
    """Of one token, take the first."""
    build = Builder(choice)
    if choice.op_type == "Gather":
        rank = len(dims(choice.inputs[1]) or ())
        choice.replace_input_with(1, build.constant(0 if rank == 0 else [0]))
    else:
        choice.replace_input_with(1, build.constant([0]))
        choice.replace_input_with(2, build.constant([1]))

"""Attention as one operator on one vector per token.

From opset 23 on that is mostly the standard ``Attention`` with (B, L, H) operands; before, the
``MultiHeadAttention`` that ONNX Runtime brings itself. B batch, L queries, K keys, A heads, D head
size, H = A * D.
"""

from typing import NamedTuple

import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules.common import no_op_transpose_rule, transpose_transpose_rule

from trainkit.export.rewrite.attention_pattern import (
    AttentionPattern,
    Mask,
    find_attention,
    match_attention,
)
from trainkit.export.rewrite.base import RewriteResult
from trainkit.export.rewrite.graph import (
    MICROSOFT,
    Builder,
    Declined,
    attribute,
    dims,
    drop_unused,
    infer_shapes,
    opset,
    rename_axes,
)
from trainkit.export.rewrite.heads import HEADS_FIRST, Heads, find_heads, tokens
from trainkit.export.rewrite.masks import Masks
from trainkit.export.rewrite.reshapes import merge_reshapes

STANDARD = 23  # the first opset with Attention

MEETING = RewritePass((transpose_transpose_rule, no_op_transpose_rule))


class Fusing(NamedTuple):
    """What is kept from one attention of a graph to the next.

    ``same`` has the axes that were found to be the same as others, or as a number.
    """

    version: int
    masks: Masks
    same: dict[str, int | str]


def fuse_attention(model: ir.Model) -> RewriteResult:
    """softmax(scale * Q K^T + mask) V, or Attention(Q, K, V) on four axes -> one on three axes.

    The operator then splits and joins the heads itself, which is faster than Transposes around it.
    A row whose mask hides every key gives what it gave before: zeros, or the average of all values.
    """
    infer_shapes(model)
    version = opset(model)
    fusing = Fusing(version, Masks(version), {})
    rewritten, declined = 0, set()
    for node in list(find_attention(model.graph)):
        try:
            rewritten += (_reshaped if node.op_type == "Attention" else _fuse)(node, fusing)
        except Declined as reason:
            declined.add(str(reason))
    if any(node.domain == MICROSOFT for node in model.graph):
        model.opset_imports.setdefault(MICROSOFT, 1)
    if rewritten:
        rename_axes(model, fusing.same)
        # Once the reshapes between them are gone, transposes meet.
        merge_reshapes(model)
        MEETING(model)
        IdentityEliminationPass()(model)
        merge_reshapes(model)
        _rows_of_queries(model, fusing.same)
    drop_unused(model)
    if not rewritten and not declined:
        declined.add("no attention was found that is not fused already")
    return RewriteResult(
        name="fuse_attention", rewritten=rewritten, declined=tuple(sorted(declined))
    )


def _fuse(node: ir.Node, fusing: Fusing) -> bool:
    """Fuse the attention around a Softmax; False if there is none."""
    pattern = match_attention(node)
    if pattern is None:
        return False
    if pattern.node.outputs[0].is_graph_output():
        raise Declined("the attention's output is an output of the graph")
    build = Builder(pattern.node)
    heads, operands = _operands(pattern, build)
    masked = pattern.mask != Mask()
    # On rows without a visible key the standard operator gives zeros in ONNX Runtime for
    # any kind of mask; the runtime's own averages all values. Each where it is right.
    if fusing.version >= STANDARD and (pattern.mask.zeros or not masked):
        context = _standard(pattern, heads, operands, build, fusing.masks)
    else:
        context = _runtime(pattern, heads, operands, build, fusing.masks)
    _replace(pattern.node.outputs[0], context, heads, build, fusing)
    return True


def _standard(
    pattern: AttentionPattern, heads: Heads, operands: list[ir.Value], build: Builder, masks: Masks
) -> ir.Value:
    mask = (masks.as_bools(pattern.mask, operands[0], build),) if pattern.mask.zeros else ()
    return build(
        "Attention",
        *operands,
        *mask,
        shape=dims(operands[0]),
        q_num_heads=heads.number,
        kv_num_heads=heads.number,
        scale=pattern.scale,
    )


def _runtime(
    pattern: AttentionPattern, heads: Heads, operands: list[ir.Value], build: Builder, masks: Masks
) -> ir.Value:
    bias = masks.as_floats(pattern.mask, operands[0], build)
    context = build(
        "MultiHeadAttention",
        *operands,
        *((None, None, bias) if bias is not None else ()),
        domain=MICROSOFT,
        shape=dims(operands[0]),
        num_heads=heads.number,
        scale=pattern.scale,
    )
    if pattern.mask.zeros:
        return masks.zero_unseen(context, heads, pattern.mask, build)
    return context


def _reshaped(node: ir.Node, fusing: Fusing) -> bool:
    """Give a four-axis ``Attention`` three-axis operands; all else about it stays."""
    if any(value is not None for value in node.inputs[4:]) or any(
        output.uses() or output.is_graph_output() for output in node.outputs[1:]
    ):
        raise Declined("an Attention keeps keys and values for the next call")
    if node.outputs[0].is_graph_output():
        raise Declined("the attention's output is an output of the graph")
    query, key, value = node.inputs[:3]
    assert query is not None
    assert key is not None
    assert value is not None
    build = Builder(node)
    heads, groups = find_heads(query), find_heads(key)
    if find_heads(value) != groups:
        raise Declined("an attention's values have other heads than its keys")
    operands = [
        tokens(query, heads, build),
        tokens(key, groups, build),
        tokens(value, groups, build),
    ]
    kept = {
        name: attribute(node, name)
        for name in ("is_causal", "scale", "softcap", "softmax_precision")
        if name in node.attributes
    }
    context = build(
        "Attention",
        *operands,
        *node.inputs[3:4],
        shape=dims(operands[0]),
        q_num_heads=heads.number,
        kv_num_heads=groups.number,
        **kept,
    )
    _replace(node.outputs[0], context, heads, build, fusing)
    return True


def _operands(pattern: AttentionPattern, build: Builder) -> tuple[Heads, list[ir.Value]]:
    if pattern.query.dtype != ir.DataType.FLOAT:
        raise Declined("attention is not computed in float32")
    heads = find_heads(pattern.query)
    if heads != find_heads(pattern.key) or heads != find_heads(pattern.value):
        raise Declined("queries, keys and values have different numbers of heads or sizes")
    return heads, [
        tokens(value, heads, build) for value in (pattern.query, pattern.key, pattern.value)
    ]


def _replace(
    output: ir.Value, context: ir.Value, heads: Heads, build: Builder, fusing: Fusing
) -> None:
    """Put ``context`` (B, L, H) where ``output`` (B, A, L, D) was read."""
    shape = dims(context) or (None, None, None)
    split = build(
        "Reshape",
        context,
        [0, 0, heads.number, heads.size],
        shape=[*shape[:2], heads.number, heads.size],
    )
    first = [shape[0], heads.number, shape[1], heads.size]
    for old, new in zip(dims(output) or (), first, strict=False):
        if isinstance(old, str) and new is not None:
            fusing.same[old] = new
    for node in list(output.consumers()):
        if node.op_type == "Transpose" and list(attribute(node, "perm", ())) == HEADS_FIRST:
            _substitute(node.outputs[0], split)
    if output.uses():
        output.replace_all_uses_with(build("Transpose", split, perm=HEADS_FIRST, shape=first))


def _substitute(old: ir.Value, new: ir.Value) -> None:
    if old.is_graph_output():
        raise Declined("the attention's output is an output of the graph")
    old.replace_all_uses_with(new)


def _rows_of_queries(model: ir.Model, same: dict[str, int | str]) -> None:
    """Give what attention returns the axes of its queries, now that no Reshape hides them."""
    for node in model.graph:
        if node.op_type in ("Attention", "MultiHeadAttention"):
            known = zip(dims(node.outputs[0]) or (), dims(node.inputs[0]) or (), strict=False)
            same.update((old, new) for old, new in list(known)[:2] if isinstance(old, str) and new)
    rename_axes(model, {old: new for old, new in same.items() if old != new})

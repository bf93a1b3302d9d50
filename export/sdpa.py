"""Scaled dot-product attention in plain operators, for opsets without an ``Attention`` operator.

The exporter's own translation gives a row whose mask hides every key the average of all values;
PyTorch gives it zeros (Vaswani et al. 2017, with the softmax over an empty set taken as zero).
"""

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset18

op: Any = opset18  # its types know no symbolic tensors

LOWEST = float(np.finfo(np.float32).min)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """(B, A, S, D) queries, (B, A or fewer, K, D) keys and values, (B, 1, S, K) mask."""
    if scale is None:
        scale = 1 / math.sqrt(query.shape[3])
    if is_causal:
        attn_mask = _causal(query, key)
    if enable_gqa and query.shape[1] != key.shape[1]:
        key, value = (_repeated(states, query.shape[1]) for states in (key, value))
    scaled = op.Mul(query, op.Constant(value_float=scale))
    scores = op.MatMul(scaled, op.Transpose(key, perm=[0, 1, 3, 2]))
    if attn_mask is None:
        return op.MatMul(op.Softmax(scores, axis=-1), value)
    if attn_mask.dtype != ir.DataType.BOOL:
        return op.MatMul(op.Softmax(op.Add(scores, attn_mask), axis=-1), value)
    masked = op.Where(attn_mask, scores, op.Constant(value_float=LOWEST))
    weights = op.Softmax(masked, axis=-1)
    seen = op.Where(attn_mask, weights, op.Constant(value_float=0.0))
    return op.MatMul(seen, value)


def _causal(query: Any, key: Any) -> Any:
    sizes = (op.Shape(query, start=2, end=3), op.Shape(key, start=2, end=3))
    ones = op.Expand(op.Constant(value_int=1), op.Concat(*sizes, axis=0))
    return op.Cast(op.Trilu(ones, upper=0), to=ir.DataType.BOOL)


def _repeated(states: Any, heads: int) -> Any:
    """Repeat each of the fewer heads for the queries that share it (grouped-query attention)."""
    shape = op.Shape(states)
    repeats = heads // states.shape[1]
    wide = op.Concat(
        op.Slice(shape, [0], [2]),
        op.Constant(value_ints=[repeats]),
        op.Slice(shape, [2], [4]),
        axis=0,
    )
    expanded = op.Expand(op.Unsqueeze(states, [2]), wide)
    target = op.Concat(
        op.Slice(shape, [0], [1]),
        op.Constant(value_ints=[heads]),
        op.Slice(shape, [2], [4]),
        axis=0,
    )
    return op.Reshape(expanded, target)


TRANSLATIONS: dict[Any, Any] = {torch.ops.aten.scaled_dot_product_attention.default: _attention}

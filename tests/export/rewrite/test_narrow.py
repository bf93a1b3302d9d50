"""Choosing the head's token moves up to the queries of the last attention, where it may."""

import numpy as np
import onnx_ir as ir
import pytest

from trainkit.export.rewrite.graph import drop_unused
from trainkit.export.rewrite.narrow import narrow_last_layer

H = 4
FLOAT = ir.DataType.FLOAT
X, Y = f"float[batch, sequence, {H}] x", "float[batch, c] y"
LAYER = """
q = MatMul (x, wq)  k = MatMul (x, wk)  v = MatMul (x, wv)
mask = Expand (m, size)
c = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v, mask)
o = MatMul (c, wo)  r = Add (o, x)  n = LayerNormalization <axis = -1> (r, g, b)
"""
SIZES = """
sizes = Shape (x)  many = Slice (sizes, zero, one)  length = Slice (sizes, one, two)
size = Concat <axis = 0> (many, one, length, length)
"""
FIRST = "t = Gather <axis = 1> (n, first)  y = MatMul (t, wh)"


def weights():
    random = np.random.default_rng(0)
    return {
        **{
            name: random.normal(size=(H, H)).astype(np.float32)
            for name in ("wq", "wk", "wv", "wo", "wh")
        },
        "g": np.float32([1, 2, 3, 4]),
        "b": np.float32([0, 1, 0, -1]),
        "first": np.array(0),
        "zero": np.array([0]),
        "one": np.array([1]),
        "two": np.array([2]),
    }


@pytest.fixture
def model_of(graph_of):
    """Return a function that builds a one-layer encoder with a head."""

    def build(head=FIRST, layer=LAYER, outputs=Y, **more):
        return graph_of(
            f"{X}, bool[batch, 1, 1, sequence] m",
            outputs,
            SIZES + layer + head,
            opset=23,
            **weights(),
            **more,
        )

    return build


def feeds(batch=3, length=5):
    x = np.random.default_rng(1).normal(size=(batch, length, H)).astype(np.float32)
    mask = np.ones((batch, 1, 1, length), dtype=bool)
    mask[0, ..., 1:] = False
    mask[-1] = False
    return {"x": x, "m": mask}


HEADS = {
    "first": FIRST,
    "last": "t = Gather <axis = 1> (n, last)  y = MatMul (t, wh)",
    "third": "t = Gather <axis = 1> (n, third)  u = Squeeze (t, one)  y = MatMul (u, wh)",
    "slice": "t = Slice (n, zero, one, one)  u = Squeeze (t, one)  y = MatMul (u, wh)",
    "through a feed-forward": """
        f = MatMul (n, wq)  e = Gelu (f)  h = MatMul (e, wk)  s = Add (h, n)
        w = LayerNormalization <axis = 2> (s, g, b)  t = Gather <axis = 1> (w, first)
        y = MatMul (t, wh)""",
}


@pytest.mark.parametrize("head", HEADS)
def test_only_the_chosen_tokens_queries_are_computed(head, model_of, run_model):
    model = model_of(HEADS[head], last=np.array(-1), third=np.array([2]))
    expected = [run_model(model, feeds(*shape))[0] for shape in ((3, 5), (1, 3), (2, 9))]
    assert narrow_last_layer(model).rewritten == 1
    (attention,) = (node for node in model.graph if node.op_type == "Attention")
    assert [list(value.shape)[1] for value in attention.inputs[:1]] == [1]
    assert str(attention.inputs[1].shape[1]) == "sequence"
    for shape, before in zip(((3, 5), (1, 3), (2, 9)), expected, strict=True):
        np.testing.assert_allclose(run_model(model, feeds(*shape))[0], before, atol=1e-5)
    assert narrow_last_layer(model).rewritten == 0


DECLINES = {
    "all tokens are averaged": (
        {"head": "t = ReduceMean <keepdims = 0> (n, one)  y = MatMul (t, wh)"},
        "pools them all",
    ),
    "the position is computed": (
        {
            "head": """i = Shape <start = 0, end = 1> (x)  j = Sub (i, i)  k2 = Squeeze (j)
                       t = Gather <axis = 1> (n, k2)  y = MatMul (t, wh)"""
        },
        "pools them all",
    ),
    "two tokens are taken": (
        {
            "head": """t = Gather <axis = 1> (n, both)  u = ReduceSum <keepdims = 0> (t, one)
                       y = MatMul (u, wh)"""
        },
        "pools them all",
    ),
    "the states are an output too": (
        {"outputs": f"{Y}, float[batch, sequence, {H}] n"},
        "LayerNormalization, whose output is needed for all tokens",
    ),
    "something mixes tokens after the attention": (
        {
            "head": """w = Softmax <axis = 1> (n)  t = Gather <axis = 1> (w, first)
                       y = MatMul (t, wh)"""
        },
        "Softmax, which does not treat each token by itself",
    ),
    "an operand is the same for all rows, but not for all tokens": (
        {
            "head": """position = ReduceMean (x, zero)  o2 = Add (n, position)
                       t = Gather <axis = 1> (o2, first)
                       y = MatMul (t, wh)"""
        },
        "Add, which does not treat each token by itself",
    ),
    "a slice says nothing of its axes": (
        {"head": "t = Slice (n, none, ends)  u = Squeeze (t, one)  y = MatMul (u, wh)"},
        "pools them all",
    ),
    "the attention is causal": (
        {"layer": LAYER.replace("kv_num_heads = 2", "kv_num_heads = 2, is_causal = 1")},
        "Attention",
    ),
}


@pytest.mark.parametrize("case", DECLINES)
def test_it_declines(case, model_of, operators):
    settings, reason = DECLINES[case]
    model = model_of(
        **settings,
        both=np.array([0, 1]),
        none=np.array([0, 0, 0]),
        ends=np.array([2**31, 1, 2**31]),
    )
    before = operators(model)
    outcome = narrow_last_layer(model)
    assert outcome.rewritten == 0
    assert reason in outcome.declined[0]
    assert operators(model) == before


def test_an_attention_that_makes_keys_of_its_own_input_is_left_alone(model_of, operators):
    """ONNX Runtime's first fused one: of one token there, all others would be lost as keys."""
    model = model_of(
        layer="c = com.microsoft.Attention <num_heads = 2> (x, wqkv, bqkv)"
        + LAYER[LAYER.index("o = MatMul") :],
        wqkv=np.ones((H, 3 * H), np.float32),
        bqkv=np.zeros(3 * H, np.float32),
    )
    (context,) = (node.outputs[0] for node in model.graph if node.domain)
    context.shape, context.type = ir.Shape(["batch", "sequence", H]), ir.TensorType(FLOAT)
    outcome = narrow_last_layer(model)
    assert outcome.rewritten == 0
    assert outcome.declined == (
        "between the last attention and the head's token stands Attention, which does not treat "
        "each token by itself",
    )
    assert operators(model).count("Gather") == 1


PLAN = """
keep2 = Or (visible, start)  keep = Reshape (keep2, flat)
places = NonZero (keep)  index = Reshape (places, flat)
counted = Cast <to = 7> (keep)  sums = CumSum (counted, first)  slot = Sub (sums, unit)
n2 = Shape (keep2)
"""
START = "i = Range (first, width, unit)  start = Equal (i, first)"
PACKED = """
xf = Reshape (x, rows)  xg = Gather <axis = 0> (xf, index)  xp = Unsqueeze (xg, zero)
q = MatMul (xp, wq)  k = MatMul (xp, wk)  v = MatMul (xp, wv)
qf = Reshape (q, rows)  qg = Gather <axis = 0> (qf, slot)  qs = Reshape (qg, whole)
kf = Reshape (k, rows)  kg = Gather <axis = 0> (kf, slot)  ks = Reshape (kg, whole)
vf = Reshape (v, rows)  vg = Gather <axis = 0> (vf, slot)  vs = Reshape (vg, whole)
mask = Expand (m, size)
c = Attention <q_num_heads = 2, kv_num_heads = 2> (qs, ks, vs, mask)
cf = Reshape (c, rows)  cg = Gather <axis = 0> (cf, index)  cp = Unsqueeze (cg, zero)
o = MatMul (cp, wo)  r = Add (o, xp)  np = LayerNormalization <axis = -1> (r, g, b)
nf = Reshape (np, rows)  ng = Gather <axis = 0> (nf, slot)  n = Reshape (ng, whole)
"""
WHOLE = "hidden = Constant <value_ints = [4]> ()  whole = Concat <axis = 0> (n2, hidden)"
WIDTH = "w1 = Shape <start = 1, end = 2> (visible)  width = Squeeze (w1)"


@pytest.fixture
def packed(graph_of):
    """Return a function that builds a packed one-layer encoder, its plan as given."""

    def build(start=START, layer=PACKED, head=FIRST):
        return graph_of(
            f"{X}, bool[batch, 1, 1, sequence] m, bool[batch, sequence] visible",
            Y,
            SIZES + WIDTH + start + PLAN + WHOLE + layer + head,
            opset=23,
            flat=np.array([-1]),
            unit=np.array(1),
            rows=np.array([-1, H]),
            last=np.array(-1),
            **weights(),
        )

    return build


def packed_feeds(batch=3, length=5):
    given = feeds(batch, length)
    return given | {"visible": given["m"][:, 0, 0]}


def test_in_the_packed_layout_the_choice_goes_through_both_gathers(packed, run_model, operators):
    model = packed()
    shapes = ((3, 5), (1, 3), (2, 9))
    expected = [run_model(model, packed_feeds(*shape))[0] for shape in shapes]
    assert narrow_last_layer(model).rewritten == 1
    for shape, before in zip(shapes, expected, strict=True):
        np.testing.assert_allclose(run_model(model, packed_feeds(*shape))[0], before, atol=1e-5)
    assert narrow_last_layer(model).rewritten == 0


PACKED_DECLINES = {
    "position 0 may be dropped": {"start": "start = Identity (visible)"},
    "another position is kept": {
        "start": "i = Range (first, width, unit)  start = Equal (i, unit)"
    },
    "another token is taken": {"head": FIRST.replace("first", "last")},
    "unpacked by another index": {
        "layer": "other = Mul (slot, first)" + PACKED.replace("(nf, slot)", "(nf, other)")
    },
}


@pytest.mark.parametrize("case", PACKED_DECLINES)
def test_a_plan_that_is_not_known_to_keep_the_token_is_left_alone(case, packed, operators):
    model = packed(**PACKED_DECLINES[case])
    drop_unused(model)
    before = operators(model)
    outcome = narrow_last_layer(model)
    assert outcome.rewritten == 0
    assert outcome.declined
    assert operators(model) == before

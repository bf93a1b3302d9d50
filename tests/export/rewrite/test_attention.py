"""Attention in plain operators, in every form that exporters give its mask, and near misses."""

import numpy as np
import onnx_ir as ir
import pytest

from trainkit.export.rewrite.attention import fuse_attention
from trainkit.export.rewrite.attention_pattern import Mask
from trainkit.export.rewrite.fold import fold_constants
from trainkit.export.rewrite.graph import Builder, dims
from trainkit.export.rewrite.masks import Masks

B, S, P, A, D = 3, 5, 2, 2, 4
HIDDEN = A * D
LOWEST = np.finfo(np.float32).min

INPUTS = f"float[batch, sequence, {HIDDEN}] x, bool[batch, 1, 1, sequence] m"
HEADS = """
q3 = MatMul (x, wq)  q4 = Reshape (q3, split)  q = Transpose <perm = [0, 2, 1, 3]> (q4)
k3 = MatMul (x, wk)  k4 = Reshape (k3, split)
v3 = MatMul (x, wv)  v4 = Reshape (v3, split)  v = Transpose <perm = [0, 2, 1, 3]> (v4)
"""
KEYS = "kt = Transpose <perm = [0, 2, 3, 1]> (k4)"
JOIN = """
c = MatMul (p, v)  t = Transpose <perm = [0, 2, 1, 3]> (c)  y = Reshape (t, join)
"""
SCORES = "r = MatMul (q, kt)  s = Mul (r, scale)"

# From scores s to weights p: (operators, whether a row without visible keys gives zeros).
MASKS = {
    "none": ("p = Softmax <axis = -1> (s)", None),
    "added floats": (
        "b = Where (m, zero, lowest)  a = Add (s, b)  p = Softmax <axis = -1> (a)",
        False,
    ),
    "added first": (
        "b = Where (m, zero, lowest)  a = Add (b, s)  p = Softmax <axis = -1> (a)",
        False,
    ),
    "added infinity with a guard": (
        """b = Where (m, zero, infinity)  a = Add (s, b)  w = Softmax <axis = -1> (a)
           n = IsNaN (w)  p = Where (n, zero, w)""",
        True,
    ),
    "computed floats": (
        """f = Cast <to = 1> (m)  i = Sub (one, f)  b = Mul (i, lowest)
           a = Add (s, b)  p = Softmax <axis = -1> (a)""",
        False,
    ),
    "chosen": ("a = Where (m, s, lowest)  p = Softmax <axis = -1> (a)", False),
    "chosen with a guard": (
        "a = Where (m, s, lowest)  w = Softmax <axis = -1> (a)  p = Where (m, w, zero)",
        True,
    ),
    "filled": ("h = Not (m)  a = Where (h, lowest, s)  p = Softmax <axis = -1> (a)", False),
    "filled with a guard": (
        "h = Not (m)  a = Where (h, infinity, s)  w = Softmax (a)  p = Where (h, zero, w)",
        True,
    ),
}


def weights():
    random = np.random.default_rng(0)
    return {
        **{
            name: random.normal(size=(HIDDEN, HIDDEN)).astype(np.float32)
            for name in ("wq", "wk", "wv")
        },
        "split": np.array([0, 0, A, D]),
        "join": np.array([0, 0, HIDDEN]),
        "scale": np.float32(0.7),
        "zero": np.float32(0),
        "one": np.float32(1),
        "lowest": np.float32(LOWEST),
        "infinity": np.float32(-np.inf),
        "weak": np.float32(-1e4),
    }


@pytest.fixture
def attention(graph_of):
    """Return a function that builds one attention: (batch, sequence, HIDDEN) to the same."""

    def build(
        mask, *, heads=HEADS, keys=KEYS, scores=SCORES, join=JOIN, opset=17, outputs="y", more=None
    ):
        listed = ", ".join(
            f"float[batch, sequence, {HIDDEN}] y" if name == "y" else f"float[b, h, n, m] {name}"
            for name in outputs.split()
        )
        return graph_of(
            INPUTS,
            listed,
            "\n".join((heads, keys, scores, mask, join)),
            opset=opset,
            **weights(),
            **(more or {}),
        )

    return build


def feeds(blank=True):
    random = np.random.default_rng(1)
    mask = np.arange(S) < np.array([S, 3, 2])[:, None]
    mask[1] = mask[1, ::-1]
    if blank:
        mask[-1] = False
    x = random.normal(size=(B, S, HIDDEN)).astype(np.float32)
    return {"x": x, "m": mask[:, None, None, :]}


def reference(x, m, zeros):
    """Compute softmax(0.7 Q K^T) V with numpy in float64, masked as torch's SDPA or averaging."""
    q, k, v = (
        (x @ weights()[name]).astype(np.float64).reshape(B, S, A, D).transpose(0, 2, 1, 3)
        for name in ("wq", "wk", "wv")
    )
    scores = np.where(m, 0.7 * q @ k.transpose(0, 1, 3, 2), -1e30)
    exponents = np.exp(scores - scores.max(-1, keepdims=True))
    found = exponents / exponents.sum(-1, keepdims=True)
    if zeros:
        found = np.where(m, found, 0)
    return (found @ v).transpose(0, 2, 1, 3).reshape(B, S, HIDDEN)


@pytest.mark.parametrize("opset", [14, 18, 23])
@pytest.mark.parametrize("form", MASKS)
def test_every_form_of_mask_gives_the_same_context(form, opset, attention, run_model):
    operators, zeros = MASKS[form]
    model = attention(operators, opset=opset)
    given = feeds()
    if zeros is None:
        given["m"] = np.ones_like(given["m"])
    before = run_model(model, given)[0] if zeros is not None or opset else None
    assert fuse_attention(model).rewritten == 1
    (found,) = run_model(model, given)
    np.testing.assert_allclose(found, before, atol=2e-5)
    np.testing.assert_allclose(found, reference(given["x"], given["m"], zeros), atol=2e-5)
    assert fuse_attention(model).rewritten == 0


def test_without_a_transpose_around_it(attention, operators):
    model = attention(MASKS["chosen with a guard"][0], opset=23)
    fuse_attention(model)
    assert operators(model).count("Transpose") == 0
    assert "Softmax" not in operators(model)
    assert [node.op_type for node in model.graph if node.op_type == "Attention"] == ["Attention"]


def test_before_opset_23_it_is_the_runtimes_own_operator(attention):
    model = attention(MASKS["added floats"][0], opset=22)
    fuse_attention(model)
    (fused,) = (node for node in model.graph if "Attention" in node.op_type)
    assert (fused.domain, fused.op_type) == ("com.microsoft", "MultiHeadAttention")
    assert model.opset_imports["com.microsoft"] == 1


@pytest.mark.parametrize(
    ("keys", "scores"),
    [
        (KEYS, "u = Mul (q, scale)  s = MatMul (u, kt)"),
        (KEYS, "d = Div (one, scale)  r = MatMul (q, kt)  s = Mul (scale, r)"),
        (
            "k = Transpose <perm = [0, 2, 1, 3]> (k4)  kt = Transpose <perm = [0, 1, 3, 2]> (k)",
            SCORES,
        ),
    ],
)
def test_the_scale_and_the_keys_transpose_may_stand_anywhere(keys, scores, attention, run_model):
    model = attention(MASKS["chosen with a guard"][0], keys=keys, scores=scores)
    given = feeds()
    before = run_model(model, given)[0]
    assert fuse_attention(model).rewritten == 1
    np.testing.assert_allclose(run_model(model, given)[0], before, atol=2e-5)


def test_the_scale_that_optimum_writes_is_read(attention, run_model):
    """From transformers 4.57: the root of the head size, read from a shape, on both operands.

    Heads are split by (B, -1, A, D), with B read from a shape as well.
    """
    heads = """
    shape = Shape (x)  batch = Gather <axis = 0> (shape, first)
    split_s = Concat <axis = 0> (batch, minus, numbers)
    q3 = MatMul (x, wq)  q4 = Reshape (q3, split_s)  q = Transpose <perm = [0, 2, 1, 3]> (q4)
    k3 = MatMul (x, wk)  k4 = Reshape (k3, split_s)
    v3 = MatMul (x, wv)  v4 = Reshape (v3, split_s)  v = Transpose <perm = [0, 2, 1, 3]> (v4)
    """
    scores = """
    qs = Shape (q)  size = Slice (qs, minus, end)  float = Cast <to = 1> (size)
    root = Sqrt (float)  share = Div (one, root)  half = Sqrt (share)
    u = Mul (q, half)  w = Mul (kt, half)  s = MatMul (u, w)
    """
    more = {
        "first": np.array([0]),
        "minus": np.array([-1]),
        "end": np.array([2**63 - 1]),
        "numbers": np.array([A, D]),
    }
    model = attention(MASKS["added floats"][0], heads=heads, scores=scores, more=more)
    given = feeds()
    before = run_model(model, given)[0]
    fold_constants(model)
    assert fuse_attention(model).rewritten == 1
    np.testing.assert_allclose(run_model(model, given)[0], before, atol=2e-5)
    (fused,) = (node for node in model.graph if node.op_type == "MultiHeadAttention")
    assert [dims(fused.outputs[0])[axis] for axis in (0, 1)] == ["batch", "sequence"]


@pytest.mark.parametrize("opset", [18, 23])
def test_a_prefix_is_joined_to_keys_and_values_before_the_heads_are(opset, graph_of, run_model):
    random = np.random.default_rng(2)
    prefix = {
        name: random.normal(size=(1, A, P, D)).astype(np.float32) for name in ("key", "value")
    }
    nodes = (
        HEADS
        + """
        n = Shape <start = 0, end = 1> (x)  size = Concat <axis = 0> (n, rest)
        k = Transpose <perm = [0, 2, 1, 3]> (k4)
        pk = Expand (key, size)  fk = Concat <axis = 2> (pk, k)
        pv = Expand (value, size)  fv = Concat <axis = -2> (pv, v)
        kt = Transpose <perm = [0, 1, 3, 2]> (fk)
        pad = Pad (m, pads, true)
        r = MatMul (q, kt)  s = Mul (r, scale)  a = Where (pad, s, lowest)
        w = Softmax <axis = -1> (a)  p = Where (pad, w, zero)
        c = MatMul (p, fv)  t = Transpose <perm = [0, 2, 1, 3]> (c)  y = Reshape (t, join)
        """
    )
    model = graph_of(
        INPUTS,
        f"float[batch, sequence, {HIDDEN}] y",
        nodes,
        opset=opset,
        rest=np.array([A, P, D]),
        pads=np.array([0, 0, 0, P, 0, 0, 0, 0]),
        true=np.array(True),
        **prefix,
        **weights(),
    )
    given = feeds()
    before = run_model(model, given)[0]
    assert fuse_attention(model).rewritten == 1
    np.testing.assert_allclose(run_model(model, given)[0], before, atol=2e-5)
    assert {node.op_type for node in model.graph}.isdisjoint({"Transpose", "Softmax"})


def test_a_causal_attention_of_the_standard_stays_causal(graph_of, run_model):
    model = graph_of(
        INPUTS,
        f"float[batch, sequence, {HIDDEN}] y",
        HEADS
        + "k = Transpose <perm = [0, 2, 1, 3]> (k4)  c = Attention <is_causal = 1> (q, k, v)"
        + "  t = Transpose <perm = [0, 2, 1, 3]> (c)  y = Reshape (t, join)",
        opset=23,
        **weights(),
    )
    given = feeds()
    before = run_model(model, given)[0]
    assert fuse_attention(model).rewritten == 1
    np.testing.assert_allclose(run_model(model, given)[0], before, atol=2e-5)


DECLINES = {
    "not low enough": {
        "mask": "a = Where (m, s, weak)  p = Softmax <axis = -1> (a)",
        "reason": "not low enough",
    },
    "another guard": {
        "mask": """o = Not (m)  a = Where (m, s, lowest)  w = Softmax <axis = -1> (a)
                   p = Where (o, w, zero)""",
        "reason": "another mask",
    },
    "a guard that is no zero": {
        "mask": """a = Where (m, s, infinity)  w = Softmax <axis = -1> (a)
                   n = IsNaN (w)  p = Where (n, one, w)""",
        "reason": "something else than zero",
    },
    "floats that may be infinite, with a guard": {
        "mask": """f = Cast <to = 1> (m)  b = Log (f)  a = Add (s, b)
                   w = Softmax <axis = -1> (a)  n = IsNaN (w)  p = Where (n, zero, w)""",
        "reason": "-infinity",
    },
    "over another axis": {"mask": "p = Softmax <axis = 2> (s)", "reason": "last axis"},
    "weights are an output": {
        "mask": MASKS["chosen"][0],
        "outputs": "y p",
        "reason": "no attention was found",
    },
    "context is an output": {
        "mask": MASKS["chosen"][0],
        "outputs": "y c",
        "reason": "output of the graph",
    },
    "weights read elsewhere": {
        "mask": MASKS["chosen"][0] + "  z = ReduceMean <axes = [1]> (p)",
        "outputs": "y z",
        "reason": "go elsewhere",
    },
    "queries turned (rotary)": {
        "heads": HEADS.replace("(q4)", "(q5)").replace("q = ", "q5 = Sin (q4)  q0 = ")
        + "  q = Cos (q0)",
        "mask": MASKS["chosen"][0],
        "reason": "rotary",
    },
    "keys in another order": {
        "keys": "k = Transpose <perm = [0, 2, 1, 3]> (k4)  kt = Reshape (k, keys)",
        "mask": MASKS["chosen"][0],
        "reason": "not transposed in a way that is known",
    },
}


@pytest.mark.parametrize("case", DECLINES)
def test_it_declines_what_it_would_compute_otherwise(case, attention, operators):
    settings = dict(DECLINES[case])
    reason = settings.pop("reason")
    if "keys" in settings:
        settings["heads"] = HEADS + f"keys = Constant <value_ints = [0, {A}, {D}, -1]> ()"
    model = attention(**settings)
    before = operators(model)
    outcome = fuse_attention(model)
    assert outcome.rewritten == 0
    assert any(reason in why for why in outcome.declined), outcome.declined
    assert operators(model) == before


def test_the_labels_probabilities_are_no_attention(graph_of):
    model = graph_of(
        "float[N, 4] x",
        "float[N, 4] y",
        "p = Softmax (x)  y = MatMul (p, w)",
        w=np.eye(4, dtype=np.float32),
    )
    assert fuse_attention(model).rewritten == 0


def test_an_attention_with_a_cache_is_left_alone(graph_of):
    heads = f"float[b, {A}, n, {D}]"
    model = graph_of(
        f"{heads} q, {heads} k, {heads} v, float[b, {A}, o, {D}] pk, float[b, {A}, o, {D}] pv",
        f"{heads} y",
        "c, nk, nv = Attention (q, k, v, , pk, pv)  y = Relu (c)",
        opset=23,
    )
    outcome = fuse_attention(model)
    assert outcome.rewritten == 0
    assert "next call" in outcome.declined[0]


def test_masks_are_made_once_for_all_layers(exported):
    model = ir.load(exported("bert", "legacy", 14))
    from trainkit.export.rewrite.fold import fold_constants

    fold_constants(model)
    fuse_attention(model)
    biases = {node.inputs[5] for node in model.graph if node.op_type == "MultiHeadAttention"}
    assert len(biases) == 1


def test_values_of_another_head_size_are_left_alone(graph_of):
    model = graph_of(
        f"float[b, {A}, n, {D}] q, float[b, {A}, n, {D}] k, float[b, {A}, n, 2] v",
        f"float[b, {A}, n, 2] y",
        """q3 = Transpose <perm = [0, 2, 1, 3]> (q)  q2 = Reshape (q3, wide)
        k3 = Transpose <perm = [0, 2, 1, 3]> (k)  k2 = Reshape (k3, wide)
        v3 = Transpose <perm = [0, 2, 1, 3]> (v)  v2 = Reshape (v3, narrow)
        q5 = Reshape (q2, split)  q6 = Transpose <perm = [0, 2, 1, 3]> (q5)
        k5 = Reshape (k2, split)  k6 = Transpose <perm = [0, 2, 1, 3]> (k5)
        v5 = Reshape (v2, split2)  v6 = Transpose <perm = [0, 2, 1, 3]> (v5)
        c = Attention (q6, k6, v6)  y = Relu (c)""",
        opset=23,
        wide=np.array([0, 0, A * D]),
        narrow=np.array([0, 0, A * 2]),
        split=np.array([0, 0, A, D]),
        split2=np.array([0, 0, A, 2]),
    )
    outcome = fuse_attention(model)
    assert outcome.rewritten == 0
    assert "values have other heads than its keys" in outcome.declined[0]


def test_queries_of_another_length_get_a_mask_of_their_own(graph_of):
    """As where a few learned queries pool the states: a mask has one row for each query."""
    model = graph_of(
        f"float[b, s, {HIDDEN}] x, float[b, 2, {HIDDEN}] few, bool[b, 1, 1, s] m",
        f"float[b, s, {HIDDEN}] y",
        "y = Relu (x)",
    )
    states, few, mask = model.graph.inputs
    masks, build = Masks(23), Builder(model.graph[0])
    one, other, again = (
        masks.as_bools(Mask(visible=mask), query, build) for query in (states, few, states)
    )
    assert one is again
    assert [dims(value)[2] for value in (one, other)] == ["s", 2]

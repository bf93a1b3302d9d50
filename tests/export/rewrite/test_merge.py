import re

import numpy as np
import pytest

from trainkit.export.rewrite.merge import merge_qkv

K, N = 6, 4


def weights(*names, width=N):
    random = np.random.default_rng(0)
    return {
        name: random.normal(size=(K, width) if name.startswith("w") else width).astype(np.float32)
        for name in names
    }


def feeds():
    return {"x": np.random.default_rng(1).normal(size=(2, 3, K)).astype(np.float32)}


THREE = """
p1 = MatMul (x, w1)  a = Add (p1, b1)
p2 = MatMul (x, w2)  b = Add (b2, p2)
p3 = MatMul (x, w3)  c = Add (p3, b3)
"""
SUM = "s = Add (a, b)  t = Sub (s, c)  y = Relu (t)"
X, Y = f"float[B, S, {K}] x", f"float[B, S, {N}] y"
NAMES = ("w1", "w2", "w3", "b1", "b2", "b3")


@pytest.mark.parametrize("bias", [True, False])
def test_three_products_of_one_input_become_one(bias, graph_of, run_model, operators):
    nodes = THREE if bias else "a = MatMul (x, w1)  b = MatMul (x, w2)  c = MatMul (x, w3)"
    model = graph_of(X, Y, nodes + SUM, **weights(*NAMES[: 6 if bias else 3]))
    before = run_model(model, feeds())[0]
    assert merge_qkv(model).rewritten == 1
    assert operators(model)[: 2 + bias] == ["MatMul", *["Add"] * bias, "Split"]
    np.testing.assert_allclose(run_model(model, feeds())[0], before, atol=1e-6)
    assert merge_qkv(model).rewritten == 0


def test_widths_may_differ(graph_of, run_model):
    given = weights("w1", "b1") | weights("w2", "b2", "w3", "b3", width=2)
    model = graph_of(
        X,
        f"float[B, S, {N}] y",
        THREE + "d = Concat <axis = -1> (b, c)  y = Add (a, d)",
        **given,
    )
    before = run_model(model, feeds())[0]
    assert merge_qkv(model).rewritten == 1
    np.testing.assert_allclose(run_model(model, feeds())[0], before, atol=1e-6)


def test_the_gathers_that_unpack_take_the_parts_without_a_split(graph_of, run_model, operators):
    model = graph_of(
        f"float[1, T, {K}] x, int64[M] slot",
        f"float[M, 2, {N // 2}] y",
        THREE
        + "".join(
            f"{n}r = Reshape ({n}, rows)  {n}g = Gather <axis = 0> ({n}r, slot)\n" for n in "abc"
        )
        + "s = Add (ag, bg)  y = Sub (s, cg)",
        rows=np.array([-1, 2, N // 2]),
        **weights(*NAMES),
    )
    given = {
        "x": np.random.default_rng(1).normal(size=(1, 5, K)).astype(np.float32),
        "slot": np.array([0, 0, 4, 3, -1, 2]),
    }
    before = run_model(model, given)[0]
    assert merge_qkv(model).rewritten == 1
    assert "Split" not in operators(model)
    np.testing.assert_allclose(run_model(model, given)[0], before, atol=1e-6)


def test_layers_that_share_their_weights_go_on_sharing(graph_of, run_model):
    def layer(x, y):
        names = {name: f"{name}_{y}" for name in ("p1", "p2", "p3", "a", "b", "c", "s", "t")}
        return " ".join(
            names.get(word, {"x": x, "y": y}.get(word, word))
            for word in re.findall(r"\w+|\W", THREE + SUM)
        )

    model = graph_of(
        X,
        Y,
        layer("x", "m") + " z = MatMul (m, v) " + layer("z", "y"),
        v=np.ones((N, K), np.float32),
        **weights(*NAMES),
    )
    before = run_model(model, feeds())[0]
    assert merge_qkv(model).rewritten == 2
    merged = [name for name in model.graph.initializers if name.endswith(".merged")]
    assert len(merged) == 2  # weights and biases, once
    np.testing.assert_allclose(run_model(model, feeds())[0], before, rtol=1e-5)


DECLINES = {
    "a weight is used elsewhere": (
        THREE
        + "s = Add (a, b)  t = Sub (s, c)  u = MatMul (t, v)  r = MatMul (u, w1)  y = Relu (r)",
        "stored twice",
    ),
    "a product is an output": (
        THREE.replace("a = Add", "y = Add") + "d = Add (b, c)  z = Sub (y, d)",
        "output of the graph",
    ),
    "different inputs": (
        "z = Relu (x)  a = MatMul (x, w1)  b = MatMul (z, w2)  c = MatMul (z, w3)" + SUM,
        "no three products",
    ),
    "a weight that is computed": (
        "n = Neg (w0)  a = MatMul (x, n)  b = MatMul (x, w2)  c = MatMul (x, w3)" + SUM,
        "no three products",
    ),
    "two products alone": (
        "a = MatMul (x, w1)  b = MatMul (x, w2)  s = Add (a, b)  y = Relu (s)",
        "no three products",
    ),
}


@pytest.mark.parametrize("case", DECLINES)
def test_it_declines(case, graph_of, operators):
    nodes, reason = DECLINES[case]
    model = graph_of(
        X + f", float[{K}, {N}] w0",
        f"{Y}, float[B, S, {N}] z" if "z = Sub" in nodes else Y,
        nodes,
        v=np.ones((N, K), np.float32),
        **weights(*NAMES),
    )
    before = operators(model)
    outcome = merge_qkv(model)
    assert outcome.rewritten == 0
    assert reason in outcome.declined[0]
    assert [op for op in operators(model) if op != "Add"] == [op for op in before if op != "Add"]


def test_keys_and_values_of_one_attention_are_merged_without_queries(graph_of, run_model):
    model = graph_of(
        f"float[B, S, {K}] x, float[B, 1, {N}] q",
        f"float[B, 1, {N}] y",
        "k = MatMul (x, w1)  v = MatMul (x, w2)"
        "  y = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v)",
        opset=23,
        **weights("w1", "w2"),
    )
    given = feeds() | {"q": np.ones((2, 1, N), np.float32)}
    before = run_model(model, given)[0]
    assert merge_qkv(model).rewritten == 1
    np.testing.assert_allclose(run_model(model, given)[0], before, atol=1e-6)


def test_old_opsets_are_left_alone(graph_of):
    model = graph_of(X, Y, THREE + SUM, opset=11, **weights(*NAMES))
    assert merge_qkv(model).declined == ("the opset is below 13",)


def test_a_bias_that_is_no_row_is_not_taken_for_one(graph_of, run_model):
    model = graph_of(
        X,
        Y,
        THREE.replace("b1", "wide") + SUM,
        wide=np.arange(3 * N, dtype=np.float32).reshape(1, 3, N),
        **weights("w1", "w2", "w3", "b2", "b3"),
    )
    before = run_model(model, feeds())[0]
    merge_qkv(model)
    np.testing.assert_allclose(run_model(model, feeds())[0], before, atol=1e-6)

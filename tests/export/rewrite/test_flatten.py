import numpy as np
import pytest

from trainkit.export.rewrite.flatten import flatten_tokens

H = 4
X, Y = f"float[batch, sequence, {H}] x", f"float[batch, sequence, {H}] y"


def weights():
    random = np.random.default_rng(0)
    return {
        "w": random.normal(size=(H, H)).astype(np.float32),
        "b": random.normal(size=(H,)).astype(np.float32),
        "deep": random.normal(size=(1, 1, H)).astype(np.float32),
        "g": np.ones(H, np.float32),
        "two": np.float32([2]),
        "axis": np.array([2]),
    }


def feeds(batch=3, length=5):
    return {"x": np.random.default_rng(1).normal(size=(batch, length, H)).astype(np.float32)}


# Running sums along the tokens at the end: that cannot be done on one axis for all of them.
GRAPHS = {
    "a layer": """p = MatMul (x, w)  a = Add (p, b)  e = Erf (a)  q = MatMul (e, w)  r = Add (q, x)
                  n = LayerNormalization <axis = 2> (r, g, b)  y = CumSum (n, place)""",
    "a constant on three axes": "p = MatMul (x, w)  a = Mul (p, deep)  y = CumSum (a, place)",
    "an own normalisation": """p = MatMul (x, w)  m = ReduceMean <axes = [2]> (p)  d = Sub (p, m)
                               s = Softmax <axis = 2> (d)  y = CumSum (s, place)""",
    "two that meet": """p = MatMul (x, w)  z = Tanh (x)  q = MatMul (z, w)  a = Add (p, q)
                        y = CumSum (a, place)""",
}


@pytest.mark.parametrize("graph", GRAPHS)
def test_products_work_on_two_axes(graph, graph_of, run_model):
    nodes = GRAPHS[graph]
    model = graph_of(X, Y, nodes, place=np.array(1), **weights())
    expected = [run_model(model, feeds(*shape))[0] for shape in ((3, 5), (1, 1))]
    products = nodes.count("MatMul")
    assert flatten_tokens(model).rewritten == products
    assert {len(n.outputs[0].shape) for n in model.graph if n.op_type == "MatMul"} == {2}
    for shape, before in zip(((3, 5), (1, 1)), expected, strict=True):
        np.testing.assert_allclose(run_model(model, feeds(*shape))[0], before, atol=1e-6)
    assert flatten_tokens(model).rewritten == 0


DECLINES = {
    "no product": "y = Relu (x)",
    "a product with a computed matrix": "t = Transpose <perm = [0, 2, 1]> (x)  s = MatMul (x, t)"
    "  y = MatMul (s, x)",
    "a product that is the output": "y = MatMul (x, w)",
}


@pytest.mark.parametrize("case", DECLINES)
def test_it_declines(case, graph_of, operators):
    model = graph_of(X, Y, DECLINES[case], **weights())
    before = operators(model)
    assert flatten_tokens(model).declined
    assert operators(model) == before


def test_an_operand_that_differs_from_token_to_token_stays_on_three_axes(graph_of, run_model):
    """Positions (1, sequence, H) are not one row for all, nor one row a token."""
    model = graph_of(
        X + f", float[1, sequence, {H}] positions",
        Y,
        "a = Add (x, positions)  p = MatMul (a, w)  c = Add (p, positions)  y = Relu (c)",
        **weights(),
    )
    given = feeds() | {"positions": np.random.default_rng(2).normal(size=(1, 5, H)).astype("f")}
    before = run_model(model, given)[0]
    assert flatten_tokens(model).rewritten == 1
    np.testing.assert_allclose(run_model(model, given)[0], before, atol=1e-6)


def test_a_region_does_not_wait_for_itself(graph_of, run_model):
    """Its own axes are read off what it begins with, never off what is made from its output."""
    model = graph_of(
        X,
        Y,
        """p = MatMul (x, w)  c = CumSum (p, place)  q = MatMul (c, w)  r = Add (q, p)
           d = CumSum (r, place)  s = Add (d, r)  y = CumSum (s, place)""",
        place=np.array(1),
        **weights(),
    )
    before = run_model(model, feeds())[0]
    assert flatten_tokens(model).rewritten == 2
    np.testing.assert_allclose(run_model(model, feeds())[0], before, rtol=1e-4, atol=1e-5)

import numpy as np
import pytest

from trainkit.export.rewrite.gathers import gather_rows

A, D = 2, 4
H = A * D
X = f"float[tokens, {H}] x, int64[batch, sequence] places"
Y = f"float[batch, sequence, {H}] y"
ROWS = {"heads": np.array([-1, A, D]), "flat": np.array([-1]), "row": np.array([-1, H])}

UNPACK = """i = Reshape (places, flat)  h = Reshape (x, heads)  g = Gather <axis = 0> (h, i)
            s = Shape (places)  target = Concat <axis = 0> (s, width)"""
GRAPHS = {
    "unpacked": f"{UNPACK}  r = Reshape (g, target)  y = Relu (r)",
    "unpacked thrice": f"""{UNPACK}  r = Reshape (g, target)  a = Gather <axis = 0> (h, i)
                           b = Reshape (a, target)  k = Neg (x)  l = Reshape (k, heads)
                           c = Gather <axis = 0> (l, i)  d = Reshape (c, target)
                           e = Add (r, b)  y = Add (e, d)""",
    "packed again": f"""{UNPACK}  r = Reshape (g, target)  p = Reshape (r, heads)
                        q = Gather <axis = 0> (p, i)  t = Reshape (q, row)  u = Relu (t)
                        y = Reshape (u, target)""",
}
REWRITTEN = {"unpacked": 1, "unpacked thrice": 3, "packed again": 2}


def feeds(batch=3, length=5, tokens=11):
    random = np.random.default_rng(0)
    return {
        "x": random.normal(size=(tokens, H)).astype(np.float32),
        "places": random.integers(0, min(tokens, batch * length), (batch, length)),
    }


def model_of(graph_of, nodes):
    return graph_of(X, Y, nodes, width=np.array([H]), **ROWS)


@pytest.mark.parametrize("graph", GRAPHS)
def test_tokens_are_gathered_as_rows(graph, graph_of, run_model, operators):
    model = model_of(graph_of, GRAPHS[graph])
    given = [feeds(), feeds(1, 1, 1), feeds(7, 2, 30)]
    expected = [run_model(model, one)[0] for one in given]
    before = operators(model).count("Reshape")
    assert gather_rows(model).rewritten == REWRITTEN[graph]
    assert operators(model).count("Reshape") <= before
    assert {len(n.inputs[0].shape) for n in model.graph if n.op_type == "Gather"} == {2}
    for one, known in zip(given, expected, strict=True):
        np.testing.assert_array_equal(run_model(model, one)[0], known)
    assert gather_rows(model).rewritten == 0


def test_the_places_are_laid_out_once_for_all_that_are_gathered_by_them(graph_of, operators):
    model = model_of(graph_of, GRAPHS["unpacked thrice"])
    gather_rows(model)
    assert sorted(operators(model)).count("Reshape") == 2  # flat, and onto batch and sequence
    assert operators(model).count("Slice") == 1


DECLINES = {
    "its heads are read too": f"""{UNPACK}  r = Reshape (g, target)  m = ReduceSum (g)
                                  y = Add (r, m)""",
    "another axis is chosen from": """i = Reshape (places, flat)  h = Reshape (x, heads)
        g = Gather <axis = 1> (h, zeros)  s = Shape (places)
        target = Concat <axis = 0> (s, width)  q = Reshape (g, row)  i2 = Gather (q, i)
        e = Relu (i2)  y = Reshape (e, target)""",
    "the rows are the output": f"{UNPACK}  y = Reshape (g, target)",
    "each number is a row": """i = Reshape (places, flat)  v = Reshape (x, flat)
        g = Gather <axis = 0> (v, i)  c = Reshape (g, column)  t = MatMul (c, wide)
        s = Shape (places)  target = Concat <axis = 0> (s, width)  y = Reshape (t, target)""",
    "rows are cut up": f"""{UNPACK}  c = Reshape (g, halves)  r = Relu (c)
                           y = Reshape (r, target)""",
}


@pytest.mark.parametrize("case", DECLINES)
def test_it_declines(case, graph_of, operators):
    model = graph_of(
        X,
        Y,
        DECLINES[case],
        width=np.array([H]),
        zeros=np.zeros(A, np.int64),
        halves=np.array([-1, D]),
        column=np.array([-1, 1]),
        wide=np.ones((1, H), np.float32),
        **ROWS,
    )
    before = operators(model)
    assert gather_rows(model).declined
    assert operators(model) == before

import numpy as np
import onnx
import onnx_ir as ir

from trainkit.export.rewrite.fold import fold_constants

OPSETS = (onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("mine", 1))


def test_what_does_not_depend_on_the_inputs_is_computed_ahead(graph_of, operators, run_model):
    prefix = np.arange(6, dtype=np.float32).reshape(2, 3)
    model = graph_of(
        "float[N, 2] x",
        "float[N, 2] y",
        "t = Transpose <perm = [1, 0]> (p)  s = ReduceSum <keepdims = 0> (t, a)  y = Add (x, s)",
        p=prefix,
        a=np.array([0]),
    )
    assert fold_constants(model).rewritten == 2
    assert operators(model) == ["Add"]
    (found,) = run_model(model, {"x": np.ones((4, 2), np.float32)})
    np.testing.assert_allclose(found, 1 + np.broadcast_to(prefix.sum(1), (4, 2)))


def test_a_small_epsilon_is_no_zero(graph_of, operators):
    """onnxscript's own optimiser drops the 1e-12 of a LayerNorm: its rule takes it for 0."""
    model = graph_of(
        "float[N] x", "float[N] y", "e = Add (x, tiny)  y = Sqrt (e)", tiny=np.float32([1e-12])
    )
    assert fold_constants(model).rewritten == 0
    assert operators(model) == ["Add", "Sqrt"]


def test_adding_zero_and_multiplying_by_one_go_away(graph_of, operators, run_model):
    model = graph_of(
        "float[N, 2] x",
        "float[N, 2] y",
        "a = Add (x, zero)  b = Mul (one, a)  c = Div (b, one)  d = Sub (c, zero)  y = Relu (d)",
        zero=np.float32([0]),
        one=np.float32([1]),
    )
    fold_constants(model)
    assert operators(model) == ["Relu"]
    x = np.float32([[1, -2]])
    np.testing.assert_array_equal(run_model(model, {"x": x})[0], np.maximum(x, 0))


def test_one_divided_by_x_is_not_x(graph_of):
    model = graph_of(
        "float[N] x",
        "float[N] z",
        "y = Div (one, x)  z = Sub (zero, y)",
        one=np.float32([1]),
        zero=np.float32([0]),
    )
    assert fold_constants(model).rewritten == 0


def test_a_zero_that_adds_an_axis_stays(graph_of):
    model = graph_of(
        "float x", "float[1] z", "y = Add (x, zero)  z = Relu (y)", zero=np.float32([0])
    )
    assert fold_constants(model).rewritten == 0


def test_a_constant_that_would_bloat_the_file_is_left_to_be_computed(graph_of, operators):
    model = graph_of(
        "float[3000, 400] x",
        "float[3000, 400] y",
        "wide = Expand (row, size)  y = Add (x, wide)",
        row=np.float32([[1]]),
        size=np.array([3000, 400]),
    )
    fold_constants(model)
    assert "Expand" in operators(model)


def test_a_large_weight_is_transposed_ahead_unless_that_stores_it_twice(graph_of, operators):
    nodes = "t = Transpose <perm = [1, 0]> (w)  y = MatMul (x, t)"
    weight = np.zeros((100, 100), np.float32)
    model = graph_of("float[N, 100] x", "float[N, 100] y", nodes, w=weight)
    fold_constants(model)
    assert operators(model) == ["MatMul"]
    assert sum(v.const_value.size for v in model.graph.initializers.values()) == weight.size
    shared = graph_of("float[N, 100] x", "float[N, 100] z", nodes + "  z = MatMul (y, w)", w=weight)
    fold_constants(shared)
    assert sum(v.const_value.size for v in shared.graph.initializers.values()) == weight.size


def test_symbolic_axes_stay_symbolic(graph_of, run_model):
    model = graph_of(
        "float[batch, sequence, 4] x",
        "float[batch, m] y",
        "s = Shape <end = 1> (x)  t = Concat <axis = 0> (s, rest)  y = Reshape (x, t)",
        rest=np.array([-1]),
    )
    fold_constants(model)
    assert [str(dim) for dim in model.graph.inputs[0].shape] == ["batch", "sequence", "4"]
    for batch, length in ((1, 2), (3, 5)):
        (found,) = run_model(model, {"x": np.zeros((batch, length, 4), np.float32)})
        assert found.shape == (batch, 4 * length)


def test_the_older_exporters_expand_sizes_are_settled(graph_of, operators, run_model):
    model = graph_of(
        "float[1, 1, 4] x, float[batch, sequence] ids",
        "float[a, b, 4] y",
        """n = Shape <start = 0, end = 1> (ids)
           sizes = Concat <axis = 0> (n, minus, four)
           marked = Equal (sizes, marks)
           real = Where (marked, ones, sizes)
           y = Expand (x, real)""",
        minus=np.array([-1]),
        four=np.array([4]),
        marks=np.array([-1, -1, -1]),
        ones=np.array([1, 1, 1]),
    )
    fold_constants(model)
    assert "Where" not in operators(model)
    (found,) = run_model(
        model, {"x": np.zeros((1, 1, 4), np.float32), "ids": np.zeros((3, 2), np.float32)}
    )
    assert found.shape == (3, 1, 4)


def test_nothing_is_folded_that_depends_on_an_input_with_a_default(graph_of, operators):
    """An initializer that is an input too may be given another content at every run."""
    model = graph_of("float[2] x, float[2] w", "float[2] y", "t = Neg (w)  y = Add (x, t)")
    model.graph.inputs[1].const_value = ir.tensor(np.zeros(2, np.float32), name="w")
    model.graph.initializers["w"] = model.graph.inputs[1]
    fold_constants(model)
    assert "Neg" in operators(model)


def test_slices_by_attributes_are_left_alone(graph_of, operators):
    """As they were before opset 10."""
    model = graph_of(
        "float[N, 2] x",
        "int64[1] y",
        "s = Shape (x)  t = Slice <starts = [1], ends = [2]> (s)  y = Neg (t)",
        opset=9,
    )
    fold_constants(model)
    assert "Slice" in operators(model)


def test_a_function_that_is_inlined_counts(graph_of, operators):
    model = graph_of("float[N] x", "float[N] y", "y = Relu (x)")
    model = onnx.helper.make_model(ir.to_proto(model.graph), opset_imports=[*OPSETS])
    model.graph.node[0].domain, model.graph.node[0].op_type = "mine", "Twice"
    body = [
        onnx.helper.make_node("Relu", ["x"], ["t"]),
        onnx.helper.make_node("Neg", ["t"], ["y"]),
    ]
    model.functions.append(
        onnx.helper.make_function("mine", "Twice", ["x"], ["y"], body, [OPSETS[0]])
    )
    inlined = ir.from_proto(model)
    assert fold_constants(inlined).rewritten == 1
    assert operators(inlined) == ["Relu", "Neg"]

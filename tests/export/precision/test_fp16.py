"""Float16 graphs: near float32, finite where float32 is, and honest about what stayed."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from trainkit.export.precision import fp32_nodes
from trainkit.export.precision.fp16 import to_fp16
from trainkit.export.precision.overflow import overflowing
from trainkit.serve.encoding import Batch
from trainkit.serve.errors import InputError

FLOATS = {"x": (TensorProto.FLOAT, ["rows", 8])}


def dtypes(model):
    return {str(v.dtype) for v in model.graph.initializers.values() if len(v.shape) == 2}


def test_a_whole_graph_stays_near_float32_for_every_mask(tiny_encoder, tokens, onnx_graph):
    expected = onnx_graph.run(tiny_encoder(), **tokens)
    model = tiny_encoder()
    outcome = to_fp16(model)
    for found in (onnx_graph.run(model, **tokens), onnx_graph.run_in_halves(model, **tokens)):
        assert found.dtype == np.float32
        assert 0 < np.abs(found - expected).max() < 5e-3 * np.abs(expected).max()
    assert dtypes(model) == {"FLOAT16"}
    assert outcome.name == "fp16"
    assert outcome.rewritten >= 8


def test_the_inputs_and_the_output_keep_their_names_and_types(tiny_encoder):
    model = tiny_encoder()
    to_fp16(model)
    assert [(v.name, str(v.dtype)) for v in model.graph.inputs] == [
        ("input_ids", "INT64"),
        ("attention_mask", "INT64"),
    ]
    assert [(v.name, str(v.dtype)) for v in model.graph.outputs] == [("logits", "FLOAT")]


def test_the_mask_is_added_in_float32_so_that_a_hidden_row_stays_uniform(tiny_encoder, tokens):
    outcome = to_fp16(tiny_encoder())
    assert any(reason.startswith("1 Softmax in float32: a mask") for reason in outcome.declined)
    assert not any("became" in reason for reason in outcome.declined)


def test_a_mask_that_was_cast_alone_would_give_nan(tiny_encoder, tokens, onnx_graph, monkeypatch):
    monkeypatch.setattr(fp32_nodes._Marks, "_adds_mask", lambda self, node: False)
    monkeypatch.setattr(fp32_nodes, "_is_beyond", lambda value: False)
    model = tiny_encoder()
    to_fp16(model)
    assert np.isnan(onnx_graph.run_in_halves(model, **tokens)[3]).all()


def test_a_chosen_mask_constant_becomes_one_in_range_and_is_reported(onnx_graph):
    lowest = np.float32(np.finfo(np.float32).min)
    inputs = {**FLOATS, "seen": (TensorProto.BOOL, ["rows", 8])}
    nodes = [
        ("Where", ("seen", "x", "low"), ("chosen",), {}),
        ("Softmax", ("chosen",), ("logits",), {"axis": -1}),
    ]
    model = onnx_graph.build(nodes, {"low": lowest}, inputs)
    outcome = to_fp16(model)
    assert outcome.declined == ("low: -3.403e+38 became -32752",)
    seen = np.array([[True] * 4 + [False] * 4, [False] * 8])
    found = onnx_graph.run_in_halves(model, x=np.zeros((2, 8), np.float32), seen=seen)
    np.testing.assert_allclose(found, [[0.25] * 4 + [0] * 4, [0.125] * 8], atol=1e-4)


def test_a_bias_on_a_row_that_is_all_hidden_does_not_overflow(onnx_graph):
    """As in MPNet: its position bias is added to the mask."""
    inputs = {**FLOATS, "seen": (TensorProto.BOOL, ["rows", 8])}
    nodes = [
        ("Where", ("seen", "zero", "low"), ("mask",), {}),
        ("Add", ("mask", "bias"), ("biased",), {}),
        ("Add", ("x", "biased"), ("scores",), {}),
        ("Softmax", ("scores",), ("logits",), {"axis": -1}),
    ]
    lowest = np.float32(np.finfo(np.float32).min)
    model = onnx_graph.build(
        nodes, {"zero": np.float32(0), "low": lowest, "bias": np.float32(-40)}, inputs
    )
    to_fp16(model)
    seen = np.zeros((2, 8), bool)
    found = onnx_graph.run_in_halves(model, x=np.zeros((2, 8), np.float32), seen=seen)
    np.testing.assert_allclose(found, np.full((2, 8), 0.125), atol=1e-4)


def test_infinity_stays_infinity(onnx_graph):
    inputs = {**FLOATS, "seen": (TensorProto.BOOL, ["rows", 8])}
    nodes = [("Where", ("seen", "x", "low"), ("logits",), {})]
    model = onnx_graph.build(nodes, {"low": np.float32(-np.inf)}, inputs)
    assert to_fp16(model).declined == ()
    seen = np.zeros((1, 8), dtype=bool)
    assert np.isneginf(onnx_graph.run(model, x=np.ones((1, 8), np.float32), seen=seen)).all()


def test_weights_beyond_the_range_stay_and_are_reported(onnx_graph):
    weight = np.eye(8, dtype=np.float32) * 70000
    model = onnx_graph.build([("MatMul", ("x", "w"), ("logits",), {})], {"w": weight}, FLOATS)
    outcome = to_fp16(model)
    assert outcome.rewritten == 0
    assert outcome.declined == ("1 MatMul in float32: w holds values over 65504",)
    found = onnx_graph.run(model, x=np.ones((1, 8), np.float32))
    assert (found == 70000).all()


RMS = [
    ("Pow", ("x", "two"), ("squares",), {}),
    ("ReduceMean", ("squares", "last"), ("mean",), {}),
    ("Add", ("mean", "epsilon"), ("more",), {}),
    ("Sqrt", ("more",), ("root",), {}),
    ("Reciprocal", ("root",), ("inverse",), {}),
    ("Mul", ("x", "inverse"), ("unit",), {}),
    ("Mul", ("unit", "weight"), ("logits",), {}),
]


def norm(onnx_graph):
    constants = {
        "two": np.float32(2),
        "last": np.array([-1]),
        "epsilon": np.float32(1e-6),
        "weight": np.arange(1, 9, dtype=np.float32),
    }
    return onnx_graph.build(RMS, constants, FLOATS)


def test_a_norm_adds_its_squares_in_float32(onnx_graph):
    x = np.array([[1000.0] * 8, [0.0] * 8], dtype=np.float32)  # a square is a million
    model = norm(onnx_graph)
    outcome = to_fp16(model)
    expected = onnx_graph.run(norm(onnx_graph), x=x)
    np.testing.assert_allclose(onnx_graph.run_in_halves(model, x=x), expected, rtol=2e-3)
    assert outcome.rewritten == 2
    assert "1 Add in float32: it stands between nodes in float32" in outcome.declined


def test_a_norm_in_float16_would_overflow(onnx_graph, monkeypatch):
    monkeypatch.setattr(fp32_nodes, "SENSITIVE", frozenset())
    model = norm(onnx_graph)
    to_fp16(model)
    x = np.full((1, 8), 1000, dtype=np.float32)
    assert (onnx_graph.run_in_halves(model, x=x) == 0).all()  # divided by infinity


def test_positions_are_counted_exactly(onnx_graph):
    nodes = [
        ("Cast", ("ids",), ("position",), {"to": TensorProto.FLOAT}),
        ("Mul", ("position", "one"), ("logits",), {}),
    ]
    inputs = {"ids": (TensorProto.INT64, ["rows"])}
    model = onnx_graph.build(nodes, {"one": np.float32(1)}, inputs)
    to_fp16(model)
    ids = np.array([2047, 2049, 4097])
    assert onnx_graph.run(model, ids=ids).tolist() == ids.tolist()


def test_a_second_time_changes_nothing(tiny_encoder):
    model = tiny_encoder()
    to_fp16(model)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    again = to_fp16(model)
    assert (again.rewritten, again.declined) == (0, ("the graph is in float16 already",))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def overflowing_graph(onnx_graph):
    """Return ids -> a value of 80,000 -> logits of eight."""
    nodes = [
        ("Gather", ("table", "input_ids"), ("x",), {}),
        ("Mul", ("x", "up"), ("large",), {}),
        ("Mul", ("large", "down"), ("small",), {}),
        ("Add", ("small", "small"), ("logits",), {}),
    ]
    constants = {
        "table": np.full((5, 4), 400, dtype=np.float32),
        "up": np.float32(200),
        "down": np.float32(1e-4),
    }
    inputs = {"input_ids": (TensorProto.INT64, ["batch", "sequence"])}
    return onnx_graph.build(nodes, constants, inputs)


def test_values_that_overflow_on_real_texts_are_found_and_kept(onnx_graph, tmp_path):
    ids = np.zeros((2, 3), dtype=np.int64)
    batch = Batch(ids, np.ones_like(ids))
    names = overflowing(overflowing_graph(onnx_graph), [batch], tmp_path)
    assert names == ("large",)
    model = overflowing_graph(onnx_graph)
    outcome = to_fp16(model, names)
    assert "2 Mul in float32: its values leave float16's range on real texts" in outcome.declined
    np.testing.assert_allclose(onnx_graph.run_in_halves(model, input_ids=ids), 16, rtol=1e-3)
    to_fp16(blind := overflowing_graph(onnx_graph))
    assert np.isinf(onnx_graph.run_in_halves(blind, input_ids=ids)).all()


def test_to_look_for_overflow_texts_are_needed(onnx_graph, tmp_path):
    with pytest.raises(InputError, match="--data"):
        overflowing(overflowing_graph(onnx_graph), [], tmp_path)


def test_operators_of_onnx_runtime_have_the_type_of_their_input(onnx_graph):
    nodes = [
        ("FastGelu", ("x",), ("a",), {"domain": "com.microsoft"}),
        ("ReduceMean", ("a", "last"), ("logits",), {}),
    ]
    model = onnx_graph.build(nodes, {"last": np.array([-1])}, FLOATS, ["rows", 1])
    x = np.ones((2, 8), dtype=np.float32)
    expected = onnx_graph.run(model, x=x)
    assert to_fp16(model).rewritten == 1
    np.testing.assert_allclose(onnx_graph.run(model, x=x), expected, rtol=2e-3)

"""Int8 graphs against exact integer arithmetic, and what is declined and why."""

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from trainkit.export.precision.calibration import Range
from trainkit.export.precision.int8 import to_int8
from trainkit.export.precision.int8_settings import Int8Settings
from trainkit.serve.errors import InputError

SEVEN_BITS = Int8Settings(weight_bits=7)  # exact on every processor
FLOATS = {"x": (TensorProto.FLOAT, ["rows", 48])}
RANGES = {"x": Range(-3.0, 2.5)}


def emulate(x, weight, settings):
    """Compute the product as the textbook has it, in Python integers, one number at a time."""
    limit = {8: 127, 7: 64}[settings.weight_bits]
    steps = [np.float32(np.abs(column).max()) / np.float32(limit) for column in weight.T]
    result = np.zeros((len(x), weight.shape[1]))
    for m, n in itertools.product(range(len(x)), range(weight.shape[1])):
        q_w = [round(float(w / steps[n])) if steps[n] else 0 for w in weight[:, n]]
        if settings.activations == "per token":
            s_x = np.float32(np.abs(x[m]).max()) * np.float32(1 / 127)
            z_x = 0
            q_x = [round(float(v / s_x)) if s_x else 0 for v in x[m]]
        else:
            s_x = np.float32((RANGES["x"].high - RANGES["x"].low) / 255)
            z_x = round(float(-RANGES["x"].low / s_x))
            q_x = [min(max(round(float(v / s_x)) + z_x, 0), 255) for v in x[m]]
        total = sum((a - z_x) * b for a, b in zip(q_x, q_w, strict=True))
        result[m, n] = total * float(s_x) * float(steps[n])
    return result


def has_vnni():
    from trainkit.bench.measure.environment import describe

    return bool({"avx512_vnni", "avx_vnni"} & set(describe().flags))


FULL_RANGE = pytest.mark.skipif(
    not has_vnni(), reason="without VNNI products of full range saturate"
)
EVERY = [
    pytest.param(
        Int8Settings(activations=activations, weight_bits=bits),
        marks=FULL_RANGE if bits == 8 else (),
    )
    for activations, bits in itertools.product(("per token", "static"), (8, 7))
]


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_a_product_is_the_exact_integer_product(product, onnx_graph, settings):
    make, weight, x = product
    model = make()
    assert to_int8(model, settings, RANGES).rewritten == 1
    found = onnx_graph.run(model, x=x)
    np.testing.assert_allclose(found, emulate(x, weight, settings), rtol=2e-6, atol=2e-6)
    # and it is near the float product: a step is 1/127 of the largest weight
    np.testing.assert_allclose(found, x @ weight, atol=0.35)


def test_another_weight_would_be_noticed(product, onnx_graph):
    make, weight, x = product
    model = make(np.roll(weight, 1, axis=1))
    to_int8(model)
    assert np.abs(onnx_graph.run(model, x=x) - emulate(x, weight, Int8Settings())).max() > 0.1


def test_an_input_of_several_products_is_quantised_once(tiny_encoder, onnx_graph):
    model = tiny_encoder()
    outcome = to_int8(model)
    assert (outcome.name, outcome.rewritten, outcome.declined) == ("int8", 5, ())
    found = onnx_graph.counts(model)
    # one for the queries, keys and values; one for the head
    assert (found["QuantizeLinear"], found["MatMulIntegerToFloat"]) == (2, 4)


def test_a_whole_graph_stays_near_float32(tiny_encoder, tokens, onnx_graph):
    expected = onnx_graph.run(tiny_encoder(), **tokens)
    model = tiny_encoder()
    to_int8(model, Int8Settings(weight_bits=7))
    found = onnx_graph.run(model, **tokens)
    assert 0 < np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_a_second_time_changes_nothing(tiny_encoder):
    model = tiny_encoder()
    to_int8(model)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    again = to_int8(model)
    assert again.rewritten == 0
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_float_weights_are_gone_from_the_file(tiny_encoder):
    model = tiny_encoder()
    to_int8(model)
    matrices = [v for v in model.graph.initializers.values() if len(v.shape) == 2]
    assert {str(v.dtype) for v in matrices if v.shape[1] != 1} == {"INT8"}


def test_a_weight_of_two_products_is_stored_once(rng, onnx_graph):
    weight = rng.normal(0, 0.2, (48, 48)).astype(np.float32)
    nodes = [
        ("MatMul", ("x", "w"), ("a",), {}),
        ("MatMul", ("a", "w"), ("b",), {}),
        ("Transpose", ("w",), ("turned",), {"perm": [1, 0]}),
        ("MatMul", ("b", "turned"), ("logits",), {}),
    ]
    model = onnx_graph.build(nodes, {"w": weight}, FLOATS)
    x = rng.normal(0, 1, (6, 48)).astype(np.float32)
    expected = onnx_graph.run(model, x=x)
    assert to_int8(model, SEVEN_BITS).rewritten == 3
    stored = [v for v in model.graph.initializers.values() if v.name.endswith(".int8")]
    assert len(stored) == 2  # as it is, and turned: their columns have other scales
    found = onnx_graph.run(model, x=x)
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_a_tied_table_is_both_looked_up_and_multiplied(rng, onnx_graph):
    table = rng.normal(0, 0.2, (48, 48)).astype(np.float32)
    nodes = [
        ("Gather", ("table", "ids"), ("x",), {}),
        ("MatMul", ("x", "table"), ("logits",), {}),
    ]
    inputs = {"ids": (TensorProto.INT64, ["rows"])}
    model = onnx_graph.build(nodes, {"table": table}, inputs)
    ids = np.array([0, 5, 47])
    expected = onnx_graph.run(model, ids=ids)
    assert to_int8(model, SEVEN_BITS).rewritten == 2
    assert "table" not in model.graph.initializers
    assert np.abs(onnx_graph.run(model, ids=ids) - expected).max() < 0.05


def test_a_lookup_gives_the_row_to_half_a_step(rng, onnx_graph):
    table = (rng.normal(0, 1, (20, 32)) * np.arange(1, 21)[:, None]).astype(np.float32)
    inputs = {"ids": (TensorProto.INT64, ["batch", "sequence"])}
    model = onnx_graph.build(
        [("Gather", ("table", "ids"), ("logits",), {})], {"table": table}, inputs
    )
    assert to_int8(model).rewritten == 1
    ids = np.array([[0, 3], [19, 19]])
    steps = np.broadcast_to(np.abs(table).max(axis=1, keepdims=True) / 127, (20, 32))
    error = np.abs(onnx_graph.run(model, ids=ids) - table[ids])
    assert (error <= 0.5001 * steps[ids]).all()


def test_named_products_and_lookups_stay(tiny_encoder):
    model = tiny_encoder()
    outcome = to_int8(model, Int8Settings(keep=("k", "x", "logits")))
    assert outcome.rewritten == 2
    assert all("kept in fp32" in reason for reason in outcome.declined)
    assert {"w_k", "table", "head"} <= set(model.graph.initializers)
    assert "w_q" not in model.graph.initializers


def weight_of(kind):
    weight = np.full((48, 64), 0.5, dtype=np.float32)
    if kind == "NaN":
        weight[3, 4] = np.nan
    if kind == "infinity":
        weight[3, 4] = np.inf
    return weight[:, :31] if kind == "narrow" else weight


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("NaN", "NaN or infinity"), ("infinity", "NaN or infinity"), ("narrow", "31 columns")],
)
def test_a_weight_that_does_not_fit_is_declined_with_its_reason(product, kind, reason):
    make, _, _ = product
    outcome = to_int8(make(weight_of(kind)))
    assert outcome.rewritten == 0
    assert reason in outcome.declined[0]
    assert outcome.declined[0].startswith("logits: ")


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (("MatMul", ("w", "x"), ("logits",), {}), "stands on the left"),
        (("Gemm", ("x", "w"), ("logits",), {"alpha": 2.0}), "alpha"),
        (("Gemm", ("x", "w"), ("logits",), {"transA": 1}), "transA"),
    ],
)
def test_other_products_are_declined_with_their_reason(onnx_graph, node, reason):
    inputs = {"x": (TensorProto.FLOAT, [48, 48])}
    model = onnx_graph.build([node], {"w": np.ones((48, 48), np.float32)}, inputs)
    outcome = to_int8(model)
    assert (outcome.rewritten, reason in outcome.declined[0]) == (0, True)


def test_a_stack_of_matrices_is_declined(onnx_graph):
    inputs = {"x": (TensorProto.FLOAT, [2, 4, 48])}
    weights = {"w": np.ones((2, 48, 48), np.float32)}
    model = onnx_graph.build([("MatMul", ("x", "w"), ("logits",), {})], weights, inputs)
    assert to_int8(model).declined == ("logits: w has 3 axes, not 2",)


def test_shapes_that_are_gathered_are_no_embeddings(onnx_graph):
    nodes = [
        ("Shape", ("x",), ("shape",), {}),
        ("Gather", ("shape", "first"), ("count",), {}),
        ("Cast", ("count",), ("logits",), {"to": TensorProto.FLOAT}),
    ]
    model = onnx_graph.build(nodes, {"first": np.array(0)}, FLOATS)
    assert to_int8(model) == to_int8(model.clone())
    assert to_int8(model).declined == ()


def test_a_static_product_whose_input_was_not_calibrated_stays(product):
    make, _, _ = product
    outcome = to_int8(make(), Int8Settings(activations="static"))
    assert outcome.declined == ("logits: its input x was not calibrated",)


@pytest.mark.parametrize("activations", ["per token", "static"])
def test_a_bias_is_added_wherever_it_stands(product, rng, onnx_graph, activations):
    """Behind the product, or within it where the operator takes one: then no Add is left."""
    make, weight, x = product
    bias = rng.normal(0, 1, 64).astype(np.float32)
    nodes = [("MatMul", ("x", "w"), ("bare",), {}), ("Add", ("b", "bare"), ("logits",), {})]
    inputs = {"x": (TensorProto.FLOAT, ["rows", 48])}
    added, bare = onnx_graph.build(nodes, {"w": weight, "b": bias}, inputs), make()
    for model in (added, bare):
        to_int8(model, Int8Settings(activations=activations), RANGES)
    assert onnx_graph.counts(added).get("Add", 0) == (activations != "static")
    expected = onnx_graph.run(bare, x=x) + bias
    np.testing.assert_allclose(onnx_graph.run(added, x=x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activations", ["per token", "static"])
def test_a_row_alone_answers_as_among_others(product, onnx_graph, activations):
    make, _, x = product
    model = make()
    to_int8(model, Int8Settings(activations=activations), RANGES)
    together = onnx_graph.run(model, x=np.concatenate([x, 100 * x[:1]]))
    alone = np.concatenate([onnx_graph.run(model, x=row[None]) for row in x])
    assert np.array_equal(together[:-1], alone)


def test_settings_that_contradict_are_refused():
    with pytest.raises(InputError, match="percentile 99"):
        Int8Settings(percentile=99)
    with pytest.raises(InputError, match="at most 100"):
        Int8Settings(activations="static", percentile=101)


def saturating(a, b):
    """Emulate AVX2's multiply-add of bytes: two products are added in 16 bits, which saturate."""
    pairs = a.astype(np.int64) * b.astype(np.int64)
    return np.clip(pairs[0::2] + pairs[1::2], -(2**15), 2**15 - 1).sum()


@pytest.mark.parametrize(("bits", "exact"), [(8, False), (7, True)])
def test_seven_bits_never_saturate_sixteen(bits, exact):
    weight = np.ones((64, 32), dtype=np.float32)
    from trainkit.export.precision.arithmetic import quantise_weight

    column = quantise_weight(weight, bits).values[:, 0]
    highest = np.full(64, 255, dtype=np.uint8)
    true = int(highest.astype(np.int64) @ column.astype(np.int64))
    assert (saturating(highest, column) == true) == exact


@FULL_RANGE
def test_this_processor_adds_full_range_products_exactly(onnx_graph):
    weight = np.ones((48, 64), dtype=np.float32)
    model = onnx_graph.build([("MatMul", ("x", "w"), ("logits",), {})], {"w": weight}, FLOATS)
    to_int8(model)
    found = onnx_graph.run(model, x=np.ones((2, 48), dtype=np.float32))
    np.testing.assert_allclose(found, 48, rtol=1e-5)


def test_the_proto_declares_what_it_uses(product):
    make, _, _ = product
    model = make()
    to_int8(model)
    proto = ir.to_proto(model)
    assert {entry.domain for entry in proto.opset_import} == {"", "com.microsoft"}
    onnx.checker.check_model(proto, full_check=True)

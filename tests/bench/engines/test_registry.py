"""The engines that trainkit's own environment runs, each against Hugging Face's padded forward."""

import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from tests.bench import engine_process as process
from trainkit.bench.engines.base import EngineUnavailableError
from trainkit.bench.engines.registry import Spec, applicable, open_engine, parse, python_of
from trainkit.bench.studies import cold_start
from trainkit.data.splits import load_sample
from trainkit.export.bundle_writer import export_all, make_target
from trainkit.export.settings import ExportSettings
from trainkit.export.source import open_source
from trainkit.models.hub_classifier import load
from trainkit.serve.errors import CheckFailedError, InputError

TEXTS = [example.text for example in load_sample()[:21]]
TEXTS += [" ".join(TEXTS), "Mars ?"]  # one is cut
GROUPS = [TEXTS[start : start + 4] for start in range(0, len(TEXTS), 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a classifier, with its bundles in folders by their formats below it."""
    folder = process.save_classifier(tmp_path_factory.mktemp("models") / "bert", TEXTS)
    goals = [
        make_target(str(folder), name, ExportSettings(), folder / name)
        for name in ("onnx", "torchscript", "pt2")
    ]
    export_all(open_source(str(folder)), goals)
    return folder


@pytest.fixture(scope="module")
def work(folder):
    """Return the padded batches, and Hugging Face's own logits of them."""
    from transformers import AutoModelForSequenceClassification

    encoder = load(str(folder)).encoder
    batches = [encoder.encode(group) for group in GROUPS]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        logits = [
            model(**{name: torch.from_numpy(a) for name, a in batch.tensors().items()}).logits
            for batch in batches
        ]
    return batches, torch.cat(logits).numpy()


# By name: the folder of its source below the classifier's own.
OF_CLASSIFIER = {
    "huggingface": "",
    "eager": "",
    "compile": "",
    "pipeline": "",
    "torchscript": "torchscript",
    "pt2": "pt2",
    "onnx": "onnx",
    "onnx-workers": "onnx",
    "openvino": "onnx",
    "transformers-exporters": "",
    "ort-optimizer": "",
    "openvino-converter": "",
}


@pytest.fixture(scope="module")
def computed(folder, work, tmp_path_factory):
    """Run every engine in one process; returns results by name, and its HOME."""
    there = find_spec("openvino") is not None
    engines = [
        (name, folder / below)
        for name, below in OF_CLASSIFIER.items()
        if there or not name.startswith("openvino")
    ]
    place = tmp_path_factory.mktemp("engines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(place))
        results = process.compute(engines, work[0], GROUPS, place)
    return {name: result for (name, _), result in zip(engines, results, strict=True)}, place


@pytest.mark.slow  # some engines compile or convert
@pytest.mark.parametrize("name", OF_CLASSIFIER)
def test_an_engine_computes_what_hugging_face_does(name, computed, work):
    results, home = computed
    if name not in results:
        pytest.skip("OpenVINO is an extra")
    found, about = results[name]
    assert not (home / "intel").exists()  # where OpenVINO's telemetry keeps its id
    assert process.agree(found, work[1])
    assert not process.agree(found[:, ::-1], work[1])
    assert not process.agree(found + np.float32(1e-3), work[1])
    assert about["precision"] == "fp32"
    assert about["versions"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eager", pytest.param("compile", marks=pytest.mark.long)])
def test_a_run_computes_what_its_classifier_does(name, tiny_run, tmp_path):
    from trainkit.trainer import checkpoint

    classifier = checkpoint.load(tiny_run).classifier()
    batches = [classifier.encoder.encode(group) for group in GROUPS]
    ((found, _),) = process.compute([(name, tiny_run)], batches, GROUPS, tmp_path)
    assert process.agree(found, classifier.logits(TEXTS))


def test_a_source_alone_gets_the_runtime_made_for_it(folder, tiny_run):
    assert parse(str(folder)) == Spec("eager", folder)
    assert parse(str(tiny_run)) == Spec("eager", tiny_run)
    assert parse(str(folder / "pt2")) == Spec("pt2", folder / "pt2")
    assert parse(f"openvino:{folder}/onnx") == Spec("openvino", folder / "onnx")


def test_a_folder_may_have_a_colon_in_its_name(copied):
    bundle = copied("onnx").rename(copied("run").with_name("onnx:old"))
    assert parse(str(bundle)) == Spec("onnx", bundle)
    assert parse(f"openvino:{bundle}") == Spec("openvino", bundle)


def test_what_cannot_be_run_is_said_at_once(folder, tmp_path):
    for text, said in (
        (f"caffe:{folder}", "'caffe' is not a runtime; known are eager, huggingface, .*, optimum"),
        ("onnx:", "names no source"),
        (f"onnx:{folder}", "onnx takes an ONNX bundle, and .* is a Hugging Face classifier"),
        (f"huggingface:{folder}/onnx", "takes a Hugging Face classifier.* is an ONNX bundle"),
        (str(tmp_path), "neither a bundle .* nor a run .* nor a Hugging Face folder"),
        (f"{tmp_path}/a:b", "neither a bundle"),
    ):
        with pytest.raises(InputError, match=said):
            parse(text)


def test_a_source_has_its_runtimes(folder, tiny_run):
    assert applicable(tiny_run) == ["eager", "compile", "eager-cuda"]
    assert applicable(folder / "onnx") == [
        "onnx",
        "onnx-workers",
        "openvino",
        "onnx-cuda",
        "onnx-tensorrt",
    ]
    assert applicable(folder / "pt2") == ["pt2"]
    assert {"huggingface", "pipeline", "optimum-o2", "ort-optimizer"} < set(applicable(folder))


@pytest.mark.parametrize(
    ("name", "below", "said"),
    [
        ("onnx-cuda", "onnx", "no CUDAExecutionProvider; .*install trainkit-onnx\\[gpu\\]"),
        ("onnx-tensorrt", "onnx", "no TensorrtExecutionProvider"),
        ("eager-cuda", "", "no CUDA GPU"),
        ("optimum", "", "optimum not installed; run: make peers"),
    ],
)
def test_a_runtime_that_is_not_there_says_how_to_get_it(name, below, said, folder, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # of this whole process
    monkeypatch.setattr(torch, "set_num_interop_threads", lambda threads: None)
    with pytest.raises(EngineUnavailableError, match=said):
        open_engine(name, folder / below, 1)


def test_a_peer_without_its_environment_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINKIT_PEERS", str(tmp_path))
    assert python_of("onnx") is None
    with pytest.raises(
        EngineUnavailableError, match=r"environment of optimum is not in .*make peers"
    ):
        python_of("optimum-int8")
    home = tmp_path / "optimum/venv/bin"
    home.mkdir(parents=True)
    (home / ".installed").touch()
    assert python_of("optimum-int8") == home / "python"


@pytest.mark.slow
def test_the_process_of_an_onnx_bundle_imports_no_torch(folder):
    program = (
        "import sys; from pathlib import Path;"
        "from trainkit.bench.engines.registry import open_engine;"
        "open_engine('onnx', Path(sys.argv[1]), 1);"
        "print([name for name in ('torch', 'transformers', 'onnx') if name in sys.modules])"
    )
    command = [sys.executable, "-P", "-c", program, str(folder / "onnx")]
    assert subprocess.check_output(command, text=True) == "[]\n"


@pytest.mark.slow
def test_a_cold_start_of_serving_imports_none_of_the_heavy_libraries(folder):
    measured = cold_start.measure(folder / "onnx", "Who was Galileo ?", runs=3)
    assert measured.heavy_modules == ()
    assert len(measured.runs) == 3
    assert sorted(one.seconds for one in measured.runs)[1] == measured.median_s
    assert measured.peak_rss_bytes is None or measured.peak_rss_bytes > 10_000_000


@pytest.mark.slow
def test_a_cold_start_needs_an_onnx_bundle_and_a_text(folder):
    with pytest.raises(InputError, match="give an ONNX bundle"):
        cold_start.measure(folder / "torchscript", "Who was Galileo ?")
    with pytest.raises(InputError, match="is not a bundle"):
        cold_start.measure(folder, "Who was Galileo ?")
    with pytest.raises(InputError, match="runs must be at least 1"):
        cold_start.measure(folder / "onnx", "Who was Galileo ?", runs=0)
    with pytest.raises(CheckFailedError, match=r"status 1: .*text 1 of 1 is empty"):
        cold_start.measure(folder / "onnx", " ", runs=1)


@pytest.mark.slow
def test_help_is_timed():
    measured = cold_start.help_seconds(runs=3)
    assert sorted(measured.runs_s)[1] == measured.median_s > 0

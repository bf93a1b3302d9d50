"""``trainkit env``: every fault of an environment is found, with its remedy."""

import json
import subprocess
import sys
from importlib import metadata

import pytest
from click.testing import CliRunner

from trainkit import env
from trainkit.bench.measure import environment
from trainkit.cli import cli

CPU, CUDA = ("CPUExecutionProvider",), ("CUDAExecutionProvider", "CPUExecutionProvider")
SOUND = {"onnxruntime": "1.32.0", "onnxruntime-gpu": None, "torch": "2.13.0+cpu"}


def problems(versions, providers=CPU):
    return [found.problem for found in env.findings(SOUND | versions, providers)]


def test_a_sound_environment_has_no_findings():
    assert problems({}) == []
    assert problems({"onnxruntime": None, "onnxruntime-gpu": "1.31.1"}, CUDA) == []
    assert problems({"torch": None}) == []


@pytest.mark.parametrize(
    ("versions", "providers", "problem", "remedy"),
    [
        ({"onnxruntime-gpu": "1.31.1"}, CPU, "are both installed", "--force-reinstall"),
        ({"onnxruntime": None}, (), "onnxruntime is not installed", "pip install onnxruntime"),
        ({}, (), "cannot be imported", "--force-reinstall onnxruntime"),
        (
            {"onnxruntime": None, "onnxruntime-gpu": "1.31.1"},
            CPU,
            "no CUDAExecutionProvider",
            "trainkit-onnx[gpu]",
        ),
        ({"torch": "2.8.1+cu130"}, CPU, "torch 2.8.1+cu130 is older than 2.9", "--upgrade torch"),
        ({"onnxruntime": "1.9.0"}, CPU, "onnxruntime 1.9.0 is older", "--upgrade onnxruntime"),
    ],
)
def test_every_fault_of_the_distributions_is_found(versions, providers, problem, remedy):
    (found,) = env.findings(SOUND | versions, providers)
    assert problem in found.problem
    assert remedy in found.remedy


def test_two_owners_of_one_module_fail_the_command(monkeypatch):
    def version(package):
        return "1.31.1" if package == "onnxruntime-gpu" else metadata.version(package)

    monkeypatch.setattr(environment, "metadata", metadata_with(version))
    result = CliRunner().invoke(cli, ["env", "--json"])
    assert result.exit_code == 1
    assert "are both installed" in result.stderr
    (found,) = json.loads(result.stdout)["findings"]
    assert "pip uninstall --yes onnxruntime" in found["remedy"]


def metadata_with(version):
    """Return a stand-in for importlib.metadata with other versions."""

    class Metadata:
        PackageNotFoundError = metadata.PackageNotFoundError

    Metadata.version = staticmethod(version)
    return Metadata


def test_a_cuda_build_without_libraries_is_found(monkeypatch):
    """This build has no CUDA provider at all: asked for it, ONNX Runtime takes the CPU."""
    here = env.describe()
    claims_cuda = type(here)(**{**as_dict(here), "providers": CUDA, "gpu": "none"})
    monkeypatch.setattr(env, "describe", lambda: claims_cuda)
    report = env.inspect_environment()
    (found,) = report.findings
    assert "cannot use CUDA here" in found.problem
    assert "without an NVIDIA GPU" in found.remedy


def test_a_torch_that_cannot_be_imported_is_found(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    (found,) = env.inspect_environment().findings
    assert found.problem == "torch cannot be imported (libcudart.so.13: not found)"
    assert found.remedy == "pip install --force-reinstall torch"


def as_dict(struct):
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def test_here_nothing_is_wrong_and_the_report_names_no_machine():
    result = CliRunner().invoke(cli, ["env"])
    assert result.exit_code == 0, result.output
    assert "CPUExecutionProvider" in result.stdout
    import socket

    assert socket.gethostname() not in result.stdout


def test_versions_are_named_without_torch():
    program = "import sys; import trainkit.env; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr

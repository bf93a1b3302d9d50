"""The wheel, alone in an empty environment: what a production image installs."""

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "bundle"
MOST_BYTES = 250e6
NOT_SOURCE = (".*", "build", "runs", "exports", "*.egg-info", "__pycache__", "node_modules")

PROGRAM = """
import json, sys
from trainkit.serve import Classifier
answer = Classifier.load(sys.argv[1])("Who wrote the Odyssey?")
heavy = [name for name in ("torch", "transformers", "onnx") if name in sys.modules]
print(json.dumps([answer.label, heavy]))
"""


@pytest.mark.install
def test_the_wheel_alone_loads_a_bundle_and_predicts(tmp_path):
    pip = [sys.executable, "-m", "pip"]
    # A copy: a build leaves files in its folder, and would take up those of the last one.
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    build = [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("trainkit_onnx-*.whl")
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    before = size(tmp_path / "empty")
    install = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel]
    subprocess.run(install, check=True)
    assert size(tmp_path / "empty") - before < MOST_BYTES

    def run(*command):
        # Not in the repository: its folders must not be what is imported.
        done = subprocess.run(
            [python, *command], check=False, capture_output=True, text=True, cwd=tmp_path
        )
        return done.returncode, done.stdout, done.stderr

    status, out, _ = run("-c", PROGRAM, GOLDEN)
    assert (status, json.loads(out)) == (0, ["HUM", []])
    status, out, _ = run("-m", "trainkit", "predict", GOLDEN, "Who wrote the Odyssey?")
    assert (status, json.loads(out)["label"]) == (0, "HUM")
    assert run("-m", "trainkit", "verify", GOLDEN)[0] == 0
    assert run("-m", "trainkit", "data", "stats", "sample")[0] == 0
    assert run("-m", "trainkit", "evaluate", GOLDEN, "--data", "sample")[0] == 0
    assert run("-m", "trainkit", "env")[0] == 0
    status, out, err = run("-m", "trainkit", "train", "--data", "sample", "--model", "simple")
    assert status == 2
    assert "pip install 'trainkit-onnx[train]'" in err
    studies = [*(tmp_path / "empty").glob("lib/python*/site-packages/trainkit/bench/studies*")]
    assert not studies
    top_level = {path.name for path in (tmp_path / "empty").glob("lib/python*/site-packages/*")}
    assert not top_level & {"export", "serve", "bench", "tests"}


def size(folder: Path) -> int:
    """Return the bytes of all files, compiled ones left out: they come later, where they may."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return sum(path.stat().st_size for path in files)

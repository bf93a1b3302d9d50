"""The code in docs/interop.md runs on a bundle as it stands there, and answers as trainkit does."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

DOCUMENT = Path(__file__).parents[2] / "docs" / "interop.md"
QUESTIONS = ["How many people live in Peru?", "Who wrote the Odyssey?"]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def place(folder, tmp_path):
    """Return a folder with the bundle in it under the name that the document uses."""
    shutil.copytree(folder, tmp_path / "bundle")
    return tmp_path


def run(command, place):
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def is_for(program, is_hugging_faces):
    """Tell whether the block is for such a model; those for one from scratch set its config."""
    return ("onfig" in program) != is_hugging_faces


def test_plain_onnx_runtime(place, classify):
    program = blocks("python")[0]
    assert not re.search(r"torch|transformers|optimum|trainkit[^.]", program)
    expected = [answer.label for answer in classify(QUESTIONS)]
    assert run([sys.executable, "-c", program], place) == expected


def test_optimum(place, classify, is_hugging_faces):
    (program,) = [p for p in blocks("python")[1:] if is_for(p, is_hugging_faces)]
    expected = [answer.label for answer in classify(QUESTIONS)]
    assert run([sys.executable, "-c", program], place) == expected


def test_transformers_js(place, classify, is_hugging_faces, node_folder):
    (program,) = [p for p in blocks("javascript") if is_for(p, is_hugging_faces)]
    (place / "node_modules").symlink_to(node_folder / "node_modules")
    (place / "documented.mjs").write_text(program, encoding="utf-8")
    expected = [answer.label for answer in classify(QUESTIONS)]
    assert run(["node", "documented.mjs"], place) == expected


def test_the_model_passes_onnx_full_check(folder):
    onnx.checker.check_model(folder / "model.onnx", full_check=True)

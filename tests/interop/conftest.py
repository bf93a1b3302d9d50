"""Fixtures for the tests of other tools, which run in the environment of `make interop`.

``TRAINKIT_INTEROP`` is its folder: ``bundles/`` that trainkit wrote in its own environment, and
``node/`` with transformers.js.
"""

import json
import os
from pathlib import Path

import pytest

from trainkit.data.splits import load_sample
from trainkit.serve import Classifier
from trainkit.serve.bundle import MANIFEST

HOME = Path(os.environ.get("TRAINKIT_INTEROP", "")).resolve()
BUNDLES = sorted(path.parent for path in HOME.glob(f"bundles/*/{MANIFEST}"))
collect_ignore_glob = [] if "TRAINKIT_INTEROP" in os.environ else ["test_*.py"]


def pytest_configure(config):
    """Refuse to pass without a bundle: parametrized by none, a test would only be skipped."""
    if not (collect_ignore_glob or BUNDLES):
        raise pytest.UsageError(f"{HOME / 'bundles'} has no bundle in it; run: make interop")


@pytest.fixture(scope="session")
def texts():
    """Return real questions, and some texts that tokenizers might disagree on."""
    questions = [example.text for example in load_sample()[::6]]
    return [
        *questions,
        "Was heißt „Straße“?",
        "東京はどこですか",
        "naïve café 🎉?",
        "x" * 300,
    ]


@pytest.fixture(scope="session")
def long_text():
    """Return a text that is cut."""
    return "How far is it from here to there, and " * 60 + "back?"


@pytest.fixture(scope="session", params=BUNDLES, ids=lambda folder: folder.name)
def folder(request):
    """Return a bundle's folder."""
    return request.param


@pytest.fixture(scope="session")
def is_hugging_faces(folder):
    """Tell whether the architecture is one that Hugging Face's libraries know."""
    config = json.loads((folder / "config.json").read_bytes())
    return not config["model_type"].startswith("trainkit-")


@pytest.fixture(scope="session")
def classify(folder):
    """Return trainkit's own classifier, without the temperature, which other tools ignore."""
    return Classifier.load(folder, threads=1, temperature=1)


@pytest.fixture(scope="session")
def node_folder():
    """Return the folder in which node finds transformers.js."""
    return HOME / "node"

"""The peers that `make peers` gave an environment, each against Hugging Face's padded forward."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.bench import engine_process as process
from tests.conftest import ROOT
from trainkit.bench.engines.base import EngineUnavailableError
from trainkit.bench.engines.registry import python_of
from trainkit.data.splits import load_sample
from trainkit.models.hub_classifier import load

pytestmark = pytest.mark.peers

TEXTS = [example.text for example in load_sample()[:21]]
GROUPS = [TEXTS[start : start + 4] for start in range(0, len(TEXTS), 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return process.save_classifier(tmp_path_factory.mktemp("models") / "bert", TEXTS)


@pytest.mark.parametrize("name", ["optimum", "optimum-o2", "optimum-int8", "sentence-transformers"])
def test_a_peer_computes_what_hugging_face_does(name, folder, tmp_path):
    try:
        python = python_of(name)
    except EngineUnavailableError as error:
        pytest.skip(error.reason)
    encoder = load(str(folder)).encoder
    batches = [encoder.encode(group) for group in GROUPS]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = torch.cat(
            [model(*map(torch.from_numpy, batch.tensors().values())).logits for batch in batches]
        ).numpy()
    ((found, about),) = process.compute([(name, folder)], batches, GROUPS, tmp_path, python)
    assert process.agree(found, expected, about["precision"])
    assert not process.agree(found[:, ::-1], expected, about["precision"])
    assert about["precision"] == ("int8" if name == "optimum-int8" else "fp32")
    assert about["versions"]["transformers"].startswith("4.57")


LOADED = """
import sys
from importlib.metadata import packages_distributions
before = {*sys.modules}
import trainkit.bench.engines.peers, trainkit.bench.race.worker
tops = {name.partition(".")[0] for name in sys.modules.keys() - before}
of = packages_distributions()
print(*sorted({distribution for top in tops for distribution in of.get(top, ())}))
"""


@pytest.mark.parametrize("name", ["optimum", "sentence-transformers"])
def test_a_worker_loads_only_what_a_peer_has(name):
    printed = subprocess.check_output([sys.executable, "-P", "-c", LOADED], text=True)
    pinned = {
        line.partition("==")[0]
        for line in (ROOT / f"bench/studies/peers/{name}.txt").read_text().splitlines()
        if "==" in line
    }
    assert "numpy" in printed.split()
    assert {*printed.split()} <= {"trainkit", *pinned}

"""The peers that `make peers` gave an environment, each against Hugging Face's padded forward."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.bench import engine_process as process
from trainkit.bench.engines import NotThereError, python_of
from trainkit.data.splits import load_sample
from trainkit.models.hub_classifier import load

pytestmark = pytest.mark.slow  # a conversion each

TEXTS = [example.text for example in load_sample()[:21]]
GROUPS = [TEXTS[start : start + 4] for start in range(0, len(TEXTS), 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return process.save_classifier(tmp_path_factory.mktemp("models") / "bert", TEXTS)


@pytest.mark.parametrize("name", ["optimum", "optimum-o2", "optimum-int8", "sentence-transformers"])
def test_a_peer_computes_what_hugging_face_does(name, folder, tmp_path):
    try:
        python = python_of(name)
    except NotThereError as error:
        pytest.skip(error.reason)
    encoder = load(str(folder)).encoder
    batches = [encoder.encode(group) for group in GROUPS]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = torch.cat(
            [model(*map(torch.from_numpy, batch.tensors().values())).logits for batch in batches]
        ).numpy()
    found, about = process.compute(name, folder, batches, GROUPS, tmp_path, python)
    assert process.agree(found, expected, about["precision"])
    assert not process.agree(found[:, ::-1], expected, about["precision"])
    assert about["precision"] == ("int8" if name == "optimum-int8" else "fp32")
    assert about["versions"]["transformers"].startswith("4.57")

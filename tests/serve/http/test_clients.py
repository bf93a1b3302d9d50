"""Other people's clients, as they come: tritonclient with its defaults and compressed, and curl."""

import json
import shutil
import subprocess
from urllib.parse import urlsplit

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from trainkit.data.splits import load_sample
from trainkit.serve import Classifier

TEXTS = [example.text for example in load_sample()[:60]]


@pytest.fixture(scope="module")
def classify(golden):
    return Classifier.load(golden, threads=1)


@pytest.fixture
def client(address):
    client = triton.InferenceServerClient(urlsplit(address).netloc, concurrency=4)
    yield client
    client.close()


def text_input(texts, binary=True):
    tensor = triton.InferInput("text", [len(texts)], "BYTES")
    array = np.array([text.encode() for text in texts], dtype=object)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


def test_tritonclient_asks_about_the_server(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("golden")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["name"] == "trainkit"
    (version,) = client.get_model_metadata("golden")["versions"]
    assert client.is_model_ready("golden", version)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"request_compression_algorithm": "gzip", "response_compression_algorithm": "gzip"},
        {"request_compression_algorithm": "deflate"},
        {"timeout": 20_000_000, "priority": 1, "request_id": "42"},
    ],
)
def test_tritonclient_gets_the_logits_of_the_library(client, classify, options):
    result = client.infer("golden", [text_input(TEXTS)], **options)
    expected = classify.logits(TEXTS)
    np.testing.assert_allclose(result.as_numpy("logits"), expected, atol=1e-5)
    labels = [label.decode() for label in result.as_numpy("label")]
    assert labels == [prediction.label for prediction in classify(TEXTS)]
    probabilities = result.as_numpy("probabilities")
    np.testing.assert_allclose(probabilities, classify.predict_proba(TEXTS), atol=1e-5)
    assert result.get_response().get("id", "") == options.get("request_id", "")


@pytest.mark.parametrize("sent", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
def test_tritonclient_in_json_and_binary_either_way(client, classify, sent, wanted):
    outputs = [triton.InferRequestedOutput("logits", binary_data=wanted)]
    result = client.infer("golden", [text_input(TEXTS, sent)], outputs=outputs)
    np.testing.assert_allclose(result.as_numpy("logits"), classify.logits(TEXTS), atol=1e-5)
    assert result.as_numpy("label") is None


@pytest.mark.parametrize("side", ["right", "left"])
def test_tritonclient_sends_ids_padded_on_either_side(client, classify, side):
    rows = [tokens.ids for tokens in classify.tokens(TEXTS)]
    width = max(map(len, rows))
    tensors = []
    for name, values in (("input_ids", rows), ("attention_mask", [[1] * len(r) for r in rows])):
        pads = [[0] * (width - len(row)) for row in rows]
        both = zip(values, pads, strict=True)
        full = [row + pad if side == "right" else pad + row for row, pad in both]
        tensors.append(triton.InferInput(name, [len(rows), width], "INT64"))
        tensors[-1].set_data_from_numpy(np.array(full, dtype=np.int64))
    logits = client.infer("golden", tensors).as_numpy("logits")
    np.testing.assert_allclose(logits, classify.logits(TEXTS), atol=1e-5)


def test_tritonclient_at_once_gets_each_its_own(client, classify):
    waiting = [client.async_infer("golden", [text_input([text])]) for text in TEXTS]
    logits = np.concatenate([one.get_result().as_numpy("logits") for one in waiting])
    np.testing.assert_allclose(logits, classify.logits(TEXTS), atol=1e-5)
    assert len(np.unique(logits.round(4), axis=0)) > 30  # or any order would do


def test_tritonclient_reads_the_sentence_of_a_refusal(client):
    with pytest.raises(InferenceServerException, match="text 1 of 1 is empty"):
        client.infer("golden", [text_input([" "])])
    with pytest.raises(InferenceServerException, match="served are: golden"):
        client.infer("other", [text_input(["a"])])
    with pytest.raises(InferenceServerException, match="the deadline passed"):
        client.infer("golden", [text_input(["a"])], timeout=1)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_with_what_it_sends_by_default(address, classify):
    body = json.dumps({"texts": TEXTS[:3]})
    command = ["curl", "--silent", "--fail", f"{address}/classify", "-d", body]
    done = subprocess.run(command, capture_output=True, check=True, timeout=30)
    found = [prediction["label"] for prediction in json.loads(done.stdout)["predictions"]]
    assert found == [prediction.label for prediction in classify(TEXTS[:3])]

"""KServe's own client and `trainkit serve`, in an environment without torch: `make kserve`."""

import asyncio
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trainkit.serve import Classifier

kserve = pytest.importorskip("kserve", reason="kserve is not installed; run: make kserve")

GOLDEN = Path(__file__).parents[1] / "golden" / "bundle"
TEXTS = ["Who wrote the Odyssey?", "How far is Mars?", "What does DNA stand for?"]


@pytest.fixture(scope="module")
def address():
    command = [sys.executable, "-m", "trainkit", "serve", f"golden={GOLDEN}", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        yield server.stdout.readline().split()[1]
        server.terminate()


def asked(address, question):
    """Ask one question of the client, on an event loop of its own."""

    async def main():
        client = kserve.InferenceRESTClient(kserve.RESTConfig(protocol="v2"))
        try:
            return await question(client)
        finally:
            await client.close()

    return asyncio.run(main())


def request(texts):
    tensor = kserve.InferInput("text", [len(texts)], "BYTES")
    tensor.set_data_from_numpy(np.array(texts, dtype=object), binary_data=False)
    return kserve.InferRequest("golden", [tensor])


def test_it_finds_the_server_and_the_model_ready(address):
    assert asked(address, lambda client: client.is_server_live(address))
    assert asked(address, lambda client: client.is_server_ready(address))
    assert asked(address, lambda client: client.is_model_ready(address, "golden"))
    assert not asked(address, lambda client: client.is_model_ready(address, "other"))


def test_it_gets_the_logits_of_the_library(address):
    answer = asked(
        address, lambda client: client.infer(address, request(TEXTS), model_name="golden")
    )
    found = {output.name: output for output in answer.outputs}
    classify = Classifier.load(GOLDEN, threads=1)
    np.testing.assert_allclose(
        np.reshape(found["logits"].data, found["logits"].shape), classify.logits(TEXTS), atol=1e-5
    )
    assert found["label"].data == [prediction.label for prediction in classify(TEXTS)]


def test_it_hears_what_is_wrong(address):
    with pytest.raises(Exception, match="empty"):
        asked(address, lambda client: client.infer(address, request([" "]), model_name="golden"))

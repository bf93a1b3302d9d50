"""The routes on a real server: answers are the library's, and every refusal is one sentence."""

import gzip
import json
import os
import signal
import socket
import threading
import time
import zlib
from contextlib import closing, suppress
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest

from trainkit.data.splits import load_sample
from trainkit.serve import Classifier
from trainkit.serve.http import metrics
from trainkit.serve.http.exceptions import UnavailableError
from trainkit.serve.http.model_process import ModelProcess
from trainkit.serve.http.settings import Limits, Settings

TEXTS = [example.text for example in load_sample()[:40]]
INFER = "/v2/models/golden/infer"


def infer_body(texts=TEXTS, **rest):
    tensor = {"name": "text", "shape": [len(texts)], "datatype": "BYTES", "data": texts}
    return {"inputs": [tensor], **rest}


@pytest.fixture(scope="module")
def classify(golden):
    return Classifier.load(golden, threads=1)


@pytest.fixture
def client(address):
    with httpx.Client(base_url=address, timeout=30) as client:
        yield client


def error_of(response, status):
    assert response.status_code == status
    body = response.json()
    assert list(body) == ["error"]
    return body["error"]


def test_health_and_metadata_are_those_of_the_protocol(client):
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    about = client.get("/v2").json()
    assert about["name"] == "trainkit"
    assert "binary_tensor_data" in about["extensions"]
    model = client.get("/v2/models/golden").json()
    (version,) = model["versions"]
    assert model["inputs"] == [
        {"name": "text", "datatype": "BYTES", "shape": [-1]},
        {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]},
        {"name": "attention_mask", "datatype": "INT64", "shape": [-1, -1]},
    ]
    assert model["outputs"][2] == {"name": "logits", "datatype": "FP32", "shape": [-1, 6]}
    assert client.get(f"/v2/models/golden/versions/{version}").json() == model
    for path in ("", f"/versions/{version}"):
        ready = client.get(f"/v2/models/golden{path}/ready")
        assert ready.json() == {"name": "golden", "ready": True}
        answer = client.post(f"/v2/models/golden{path}/infer", json=infer_body(TEXTS[:1], id="7"))
        assert answer.json()["id"] == "7"
        assert answer.json()["model_version"] == version


def test_classify_says_what_the_library_says(client, classify):
    answer = client.post("/classify", json={"texts": TEXTS}).json()
    for found, expected in zip(answer["predictions"], classify(TEXTS), strict=True):
        assert found["label"] == expected.label
        assert found["scores"] == pytest.approx(expected.scores, abs=1e-5)
        assert found["truncated"] == expected.truncated
    assert {prediction["label"] for prediction in answer["predictions"]} > {"LOC"}
    timings = answer["timings_ms"]
    assert timings["tokenize"] + timings["queue"] + timings["infer"] <= timings["total"]


def test_a_pair_is_classified_together(client, classify):
    pair = ("How far is Mars?", "It is a planet.")
    (found,) = client.post("/classify", json={"texts": [pair]}).json()["predictions"]
    assert found["scores"] == pytest.approx(classify([pair])[0].scores, abs=1e-5)
    assert found["scores"] != pytest.approx(classify([pair[0]])[0].scores, abs=1e-5)


def test_top_k_ranks_and_a_long_text_says_that_it_was_cut(client, classify):
    long = " ".join(TEXTS)
    answer = client.post("/classify", json={"texts": [long], "top_k": 2, "model": "golden"}).json()
    (found,) = answer["predictions"]
    assert found["truncated"] is True
    expected = [(scored.label, pytest.approx(scored.score)) for scored in classify.top_k(long, 2)]
    assert list(found["scores"].items()) == expected


def test_ids_give_the_answers_of_their_texts(client, classify):
    rows = [tokens.ids for tokens in classify.tokens(TEXTS[:5])]
    width = max(map(len, rows))
    tensors = {
        "input_ids": [row + [0] * (width - len(row)) for row in rows],
        "attention_mask": [[1] * len(row) + [0] * (width - len(row)) for row in rows],
    }
    inputs = [
        {"name": name, "shape": [5, width], "datatype": "INT64", "data": data}
        for name, data in tensors.items()
    ]
    body = {"inputs": inputs, "outputs": [{"name": "logits"}]}
    (output,) = client.post(INFER, json=body).json()["outputs"]
    expected = classify.logits(TEXTS[:5]).ravel().tolist()
    assert output["data"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("path", "body", "status", "expected"),
    [
        ("/classify", {"texts": []}, 422, "from 1 to 1024 texts, not 0"),
        ("/classify", {"texts": ["a", " "]}, 422, "text 2 of 2 is empty"),
        ("/classify", {"text": ["a"]}, 400, "unknown field `text`"),
        ("/classify", {"texts": [1]}, 400, "Expected `str | array`"),
        ("/classify", {"texts": ["a"], "model": "x"}, 404, "served are: golden"),
        ("/classify", {"texts": ["a"], "top_k": 0}, 400, "Expected `int` >= 1"),
        ("/classify", {"texts": ["a"], "thresholds": 0.5}, 422, "thresholds are for multi-label"),
        (INFER, {"inputs": []}, 400, "inputs must be text alone"),
        (INFER, infer_body([""]), 422, "text 1 of 1 is empty"),
        ("/v2/models/x/infer", infer_body(), 404, "served are: golden"),
        ("/v2/models/golden/versions/1/infer", infer_body(), 404, "in version "),
        ("/v2/models/golden", {}, 405, "GET, HEAD only"),
        ("/nothing", {}, 404, "no such path"),
    ],
)
def test_a_wrong_request_is_refused_in_one_sentence(client, path, body, status, expected):
    assert expected in error_of(client.post(path, json=body), status)


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("X-Request-Timeout-Ms", "soon", 400),
        ("X-Request-Timeout-Ms", "0", 400),
        ("X-Request-Timeout-Ms", "nan", 400),
        ("X-Request-Timeout-Ms", "0.0001", 504),
        ("Inference-Header-Content-Length", "-1", 400),
        ("Inference-Header-Content-Length", "99999999", 400),
        ("Content-Encoding", "br", 415),
        ("Content-Encoding", "gzip", 400),
    ],
)
def test_wrong_headers_are_refused(client, name, value, status):
    error_of(client.post(INFER, json=infer_body(), headers={name: value}), status)


def test_the_parameter_of_the_protocol_is_a_deadline_too(client):
    error_of(client.post(INFER, json=infer_body(parameters={"timeout": 1})), 504)
    generous = {"timeout": 20_000_000, "priority": 1, "mine": {"x": [1]}}
    assert client.post(INFER, json=infer_body(parameters=generous)).status_code == 200


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_compressed_body_is_read_and_a_bomb_is_not(client, encoding):
    compress = gzip.compress if encoding == "gzip" else zlib.compress
    headers = {"Content-Encoding": encoding}
    body = compress(json.dumps({"texts": TEXTS}).encode())
    assert client.post("/classify", content=body, headers=headers).status_code == 200
    for wrong in (body[:-3], body + b"x", b"x" + body):
        error_of(client.post("/classify", content=wrong, headers=headers), 400)
    bomb = compress(b" " * (64 << 20))
    assert len(bomb) < 100_000
    assert "larger than 8388608" in error_of(
        client.post("/classify", content=bomb, headers=headers), 413
    )


def test_limits_are_checked_before_the_work(serve):
    limits = Limits(body_bytes=3000, texts=10, characters=500, tokens=100)
    with (
        serve(Settings(threads=1, limits=limits)) as (address, _),
        httpx.Client(base_url=address) as client,
    ):
        post = client.post
        assert "3000 bytes" in error_of(post("/classify", content=b" " * 3001), 413)
        pieces = (b" " * 1000 for _ in range(4))  # chunked: no Content-Length
        assert "3000 bytes" in error_of(post("/classify", content=pieces), 413)
        many = ["a"] * 11
        assert "1 to 10 texts, not 11" in error_of(post("/classify", json={"texts": many}), 422)
        assert "a request may have 10" in error_of(post(INFER, json=infer_body(many)), 422)
        assert "501 characters" in error_of(post("/classify", json={"texts": ["a" * 501]}), 413)
        pair = [["a" * 250, "b" * 251]]
        assert "501 characters" in error_of(post("/classify", json={"texts": pair}), 413)
        words = [" ".join("abcdefghijk")] * 10  # a token a letter
        assert "110 tokens" in error_of(post("/classify", json={"texts": words}), 422)
        assert post("/classify", json={"texts": words[:9]}).status_code == 200


def test_a_full_queue_says_when_to_try_again(serve):
    settings = Settings(threads=1, queue_tokens=30, batch_tokens=30)
    with serve(settings) as (address, found):
        pid = found["models"]["golden"].pid
        os.kill(pid, signal.SIGSTOP)
        try:
            statuses, retries = [], []

            def post():
                body = {"texts": [TEXTS[0] * 3]}
                headers = {"X-Request-Timeout-Ms": "3000"}
                response = httpx.post(f"{address}/classify", json=body, headers=headers, timeout=30)
                statuses.append(response.status_code)
                if response.status_code == 429:
                    retries.append(int(response.headers["Retry-After"]))

            threads = [threading.Thread(target=post) for _ in range(12)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            # Taken for hung by now, it is killed and another one is there.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        assert retries
        assert min(retries) >= 1
        assert set(statuses) <= {200, 429, 503, 504}


def test_a_token_is_asked_for_but_not_of_probes(serve):
    with serve(token="s3cret") as (address, _), httpx.Client(base_url=address) as client:
        assert client.get("/v2/health/live").status_code == 200
        assert client.get("/v2/health/ready").status_code == 200
        for sent in (None, "s3cret", "Bearer wrong", "Basic s3cret", "Bearer", "Bearer s3cretx"):
            headers = {} if sent is None else {"Authorization": sent}
            response = client.get("/models", headers=headers)
            assert "send Authorization: Bearer" in error_of(response, 401)
            assert response.headers["WWW-Authenticate"] == "Bearer"
        headers = {"Authorization": "Bearer s3cret"}
        assert client.get("/models", headers=headers).status_code == 200
        assert client.post("/classify", json={"texts": ["a"]}, headers=headers).status_code == 200


def test_while_draining_it_answers_and_closes_and_is_not_ready(serve):
    with serve(draining=lambda: True) as (address, _), httpx.Client(base_url=address) as client:
        ready = client.get("/v2/health/ready")
        assert (ready.status_code, ready.json()) == (503, {"ready": False})
        assert client.get("/v2/models/golden/ready").status_code == 503
        assert client.get("/v2/health/live").status_code == 200
        answer = client.post("/classify", json={"texts": ["a"]})
        assert answer.status_code == 200
        assert answer.headers["Connection"] == "close"


def test_request_ids_come_back_and_odd_ones_are_replaced(client):
    assert client.get("/v2", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for odd in (b"x" * 65, b"\xff", b"a\tb", b""):
        made = client.get("/v2", headers={b"X-Request-Id": odd}).headers["x-request-id"]
        assert len(made) == 32
    assert client.get("/v2").headers["x-request-id"] != client.get("/v2").headers["x-request-id"]


def test_head_has_the_headers_and_no_body(client):
    for path in ("/", "/v2", "/metrics", "/v2/health/ready"):
        head = client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert int(head.headers["content-length"]) > 0


def test_the_page_may_load_nothing_from_elsewhere(client):
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("'sha256-") >= 2
    (facts,) = client.get("/models").json()["models"]
    assert facts["labels"] == ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"]
    assert facts["max_length"] == 24


def raw(address, *parts):
    """Send bytes as they are, close the sending side, and return all that comes."""
    where = urlsplit(address)
    with closing(socket.create_connection((where.hostname, where.port), 10)) as connection:
        for part in parts:
            connection.sendall(part)
        received = b""
        while piece := connection.recv(1 << 16):
            received += piece
    return received


BODY = json.dumps({"texts": ["How far is Mars?"]}).encode()
CLOSE = b"Connection: close\r\n"


def post_of(body, headers=b""):
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\n" + headers
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def test_no_content_type_is_needed(address):
    assert b"200 OK" in raw(address, post_of(BODY, CLOSE)).splitlines()[0]


def test_a_chunked_body_is_read(address):
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (BODY[:9], BODY[9:]))
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n" + CLOSE + b"\r\n"
    assert b'"predictions"' in raw(address, head, chunks + b"0\r\n\r\n")


def test_requests_in_a_row_are_answered_in_order(address):
    first = post_of(BODY, b"X-Request-Id: one\r\n")
    second = post_of(BODY, b"X-Request-Id: two\r\n" + CLOSE)
    received = raw(address, first + second)
    assert received.count(b"200 OK") == 2
    assert 0 < received.index(b"x-request-id: one") < received.index(b"x-request-id: two")


def test_a_large_body_is_refused_by_its_announcement(address):
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n" + CLOSE + b"\r\n"
    assert b"413" in raw(address, head).splitlines()[0]


def gone(template="/classify"):
    samples = metrics.REGISTRY.get_sample_value
    labels = {"route": template, "status": "499"}
    models = ("", "golden")
    return sum(samples("trainkit_requests_total", labels | {"model": m}) or 0 for m in models)


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_half_a_body_then_nothing_harms_nobody(address, client):
    before = gone()
    where = urlsplit(address)
    with closing(socket.create_connection((where.hostname, where.port))) as connection:
        connection.sendall(post_of(BODY)[:-5])
    wait_for(lambda: gone() == before + 1)
    assert client.post("/classify", content=BODY).status_code == 200


def test_the_rows_of_a_client_that_left_are_not_run(serve):
    with serve(Settings(threads=1, max_wait_ms=700)) as (address, found):
        model, before = found["models"]["golden"], gone()
        where = urlsplit(address)
        with closing(socket.create_connection((where.hostname, where.port))) as connection:
            connection.sendall(post_of(BODY))
            wait_for(lambda: model.stats()["queued_rows"] == 1)
        wait_for(lambda: gone() == before + 1)
        assert model.stats()["queued_rows"] == 0


def test_an_unexpected_error_tells_nothing_and_has_an_id(serve, caplog):
    async def broken(texts):
        raise RuntimeError(f"cannot read {texts}")

    with serve() as (address, found):
        found["models"]["golden"].tokens = broken
        response = httpx.post(f"{address}/classify", json={"texts": ["a secret"]})
    error = error_of(response, 500)
    assert response.headers["x-request-id"] in error
    assert "secret" not in error
    (record,) = [record for record in caplog.records if record.exc_info]
    assert record.fields["request_id"] in error


@pytest.mark.parametrize("path", ["/classify", INFER])
def test_a_body_that_does_not_come_is_not_waited_for(address, path):
    at = urlsplit(address)
    head = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Length: 1000\r\n"
    with closing(socket.create_connection((at.hostname, at.port), timeout=30)) as connection:
        connection.sendall(f"{head}X-Request-Timeout-Ms: 300\r\n\r\n{{".encode())
        began = time.monotonic()
        answer = b""
        while piece := connection.recv(4096):  # until it is closed
            answer += piece
    assert 0.2 < time.monotonic() - began < 20
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"the body did not come before the deadline" in answer


def test_why_the_model_failed_is_in_the_log_and_not_in_the_answer(serve, monkeypatch, caplog):
    async def nan(self, rows):
        return np.full((len(rows), 6), np.nan, np.float32)

    with serve() as (address, _):
        monkeypatch.setattr(ModelProcess, "run", nan)
        response = httpx.post(f"{address}/classify", json={"texts": ["How far is Mars?"]})
    assert error_of(response, 500) == "the model fails on this input."
    (told,) = [one for one in caplog.records if "NaN" in one.message]
    assert told.message == "inference: some logits are NaN or infinite"
    assert told.fields == {"request_id": response.headers["X-Request-Id"]}


def test_while_the_model_restarts_it_is_not_ready(serve):
    """Its inference process is stopped, and so is known for one that does not answer."""
    with serve() as (address, found), httpx.Client(base_url=address, timeout=30) as client:
        os.kill(pid := found["models"]["golden"].pid, signal.SIGSTOP)
        try:
            for path in ("/v2/health/ready", "/v2/models/golden/ready"):
                wait_for(lambda path=path: client.get(path).status_code == 503)
            assert client.get("/v2/health/live").status_code == 200
        finally:
            with suppress(ProcessLookupError):  # it was killed by now
                os.kill(pid, signal.SIGCONT)
        wait_for(lambda: client.get("/v2/health/ready").status_code == 200)


def test_what_comes_while_the_model_stops_may_come_again(serve, monkeypatch):
    async def stopped(self, rows):
        raise UnavailableError("the model is stopped")

    with serve() as (address, _):
        monkeypatch.setattr(ModelProcess, "run", stopped)
        response = httpx.post(f"{address}/classify", json={"texts": ["How far is Mars?"]})
    assert "try again" in error_of(response, 503)
    assert response.headers["Retry-After"] == "1"

"""The admin application, around two functions that stand for the models."""

import asyncio
from pathlib import Path

import httpx
import pytest

from trainkit.serve.errors import CheckFailedError, InputError
from trainkit.serve.http.admin import Entry, application

INDEX = "/v2/repository/index"
LOAD = "/v2/repository/models/questions/load"


class Served:
    """Two models, one of them down; a folder named `bad` is refused."""

    def __init__(self):
        self.loaded = []

    def index(self):
        return [Entry("questions", "v1", "READY"), Entry("mood", "v7", "UNAVAILABLE")]

    async def load(self, name, folder):
        if folder == Path("bad"):
            raise InputError("bad is no bundle.")
        if folder == Path("half"):
            raise CheckFailedError("1 of 2 workers still serve the old version.")
        if folder == Path("bug"):
            raise KeyError("secret")
        self.loaded.append((name, folder))
        return "v2"


@pytest.fixture
def served():
    return Served()


@pytest.fixture
def post(served):
    """Return a function that posts to the application, which `token` guards."""

    def send(path, *, token=None, **options):
        async def ask():
            app = application(served.index, served.load, token)
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
                return await client.request(options.pop("method", "POST"), path, **options)

        return asyncio.run(ask())

    return send


def test_the_index_lists_every_model_or_those_that_are_ready(post):
    both = post(INDEX).json()
    assert both[0] == {"name": "questions", "version": "v1", "state": "READY", "reason": ""}
    assert [model["name"] for model in both] == ["questions", "mood"]
    assert [model["name"] for model in post(INDEX, json={"ready": True}).json()] == ["questions"]


def test_a_load_answers_with_the_new_version(post, served):
    answer = post(LOAD)
    assert (answer.status_code, answer.json()["version"]) == (200, "v2")
    post(LOAD, json={"parameters": {"folder": "runs/next"}})
    assert served.loaded == [("questions", None), ("questions", Path("runs/next"))]


@pytest.mark.parametrize(
    ("path", "body", "status", "told"),
    [
        (LOAD, b'{"parameters": {"folder": "bad"}}', 400, "bad is no bundle"),
        (LOAD, b'{"parameters": {"folder": "half"}}', 503, "old version"),
        (LOAD, b'{"parameters": {"folder": "bug"}}', 500, "the server failed"),
        (LOAD, b'{"parameters": {"path": "x"}}', 400, "unknown field `path`"),
        (LOAD, b'{"parameters": {"folder": 3}}', 400, "Expected `str | null`"),
        (LOAD, b"{", 400, "the body"),
        (LOAD, b"\xff", 400, "the body"),
        (LOAD, b" " * 70_000, 413, "larger than 65536 bytes"),
        ("/v2/repository/models/other/load", b"", 404, "'other'"),
        ("/v2/repository", b"", 404, "/v2/repository"),
    ],
)
def test_what_is_wrong_is_told_in_one_form(path, body, status, told, post, served):
    answer = post(path, content=body)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert told in answer.json()["error"]
    assert "secret" not in answer.text
    assert served.loaded == []


def test_a_method_that_is_not_there(post):
    answer = post(INDEX, method="GET")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert "error" in answer.json()


@pytest.mark.parametrize(
    "sent", [{}, {"Authorization": "Bearer other"}, {"Authorization": "open-sesame"}]
)
def test_without_the_token_nothing_is_told_or_done(sent, post, served):
    answer = post(LOAD, token="open-sesame", headers=sent)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert served.loaded == []
    right = {"Authorization": "Bearer open-sesame"}
    assert post(LOAD, token="open-sesame", headers=right).status_code == 200

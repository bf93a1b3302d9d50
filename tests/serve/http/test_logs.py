"""Log lines: one JSON object each, with what an operator needs and no word of a user's text."""

import asyncio
import io
import json
import logging
import logging.config
import time

import httpx
import pytest

from trainkit.serve.http import logs

SECRET = "Zanzibar"


@pytest.fixture
def stream(monkeypatch):
    """Log as the server does, into memory; what was configured before comes back."""
    loggers = [logging.getLogger(name) for name in (None, "trainkit", "uvicorn", "uvicorn.access")]
    before = [(one, one.level, one.propagate, one.handlers[:]) for one in loggers]
    into = io.StringIO()
    monkeypatch.setattr("sys.stderr", into)
    logging.config.dictConfig(logs.config("info"))
    yield into
    for one, level, propagate, handlers in before:
        one.setLevel(level)
        one.propagate = propagate
        one.handlers[:] = handlers


def lines(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def of_requests(stream):
    return [line for line in lines(stream) if line["logger"] == "trainkit.serve.http"]


def test_a_request_is_one_line_without_its_text(stream, address):
    post = httpx.post
    headers = {"X-Request-Id": "one"}
    query = {"q": SECRET}
    body = {"texts": [f"How far is {SECRET}?", "Who?"]}
    post(f"{address}/classify", json=body, headers=headers, params=query)
    post(f"{address}/classify", json={SECRET: SECRET})
    post(f"{address}/{SECRET}")
    tensor = {"name": SECRET, "shape": [1], "datatype": "BYTES", "data": [SECRET]}
    post(f"{address}/v2/models/golden/infer", json={"inputs": [tensor]})
    post(f"{address}/v2/models/{SECRET}/infer", json={"inputs": [tensor]})
    end = time.monotonic() + 10
    while len(found := of_requests(stream)) < 5:  # a line follows its answer
        assert time.monotonic() < end
        time.sleep(0.01)
    assert SECRET.lower() not in stream.getvalue().lower()
    first, *others = found
    times = {f"{part}_ms" for part in ("tokenize", "queue", "infer", "total")}
    assert first.keys() == times | {
        *("time", "level", "logger", "pid", "request_id", "method", "route", "status"),
        *("model", "version", "texts", "tokens"),
    }
    assert first["request_id"] == "one"
    assert (first["method"], first["route"], first["status"]) == ("POST", "/classify", 200)
    assert (first["model"], first["texts"]) == ("golden", 2)
    assert all(0 < first[name] < 10_000 for name in times)
    assert [(line["route"], line["status"]) for line in others] == [
        ("/classify", 400),
        ("other", 404),
        ("/v2/models/{model}/infer", 400),
        ("/v2/models/{model}/infer", 404),
    ]


def test_a_traceback_says_where_but_not_what(stream, serve):
    async def broken(texts):
        try:
            raise KeyError(texts[0])
        except KeyError as error:
            raise RuntimeError(f"cannot read {texts}") from error

    with serve() as (address, found):
        found["models"]["golden"].tokens = broken
        assert httpx.post(f"{address}/classify", json={"texts": [SECRET]}).status_code == 500
    assert SECRET not in stream.getvalue()
    (line,) = (line for line in lines(stream) if "exception" in line)
    assert line["level"] == "error"
    assert {"RuntimeError", "caused by", "KeyError"} <= set(line["exception"])
    assert any("in broken" in frame for frame in line["exception"])


def test_an_exception_that_nobody_fetched_is_not_quoted(stream):
    async def fail():
        raise ValueError(SECRET)

    async def main():
        task = asyncio.ensure_future(fail())
        await asyncio.wait([task])

    asyncio.run(main())
    (line,) = lines(stream)
    assert line["message"] == "Task exception was never retrieved"
    assert SECRET not in stream.getvalue()


def test_uvicorn_logs_the_same_way_and_no_access(stream):
    logging.getLogger("uvicorn.error").info("Started server process [%d]", 7)
    logging.getLogger("uvicorn.access").info('"GET /?q=%s"', SECRET)
    (line,) = lines(stream)
    assert line["message"] == "Started server process [7]"

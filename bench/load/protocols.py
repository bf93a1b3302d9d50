"""What the servers of text classifiers speak: how texts are asked for, and what an answer must be.

A protocol is one row of ``PROTOCOLS``; another is added there.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

import msgspec

from trainkit.serve.errors import InputError


class Protocol(NamedTuple):
    """``body`` makes the JSON of a request; ``answers`` counts the answers in one of a response.

    ``answers`` gives None where the response has another shape than the protocol's.
    """

    body: Callable[[Sequence[str]], Any]
    answers: Callable[[bytes], int | None]


class _Predictions(msgspec.Struct):
    predictions: list[dict[str, Any]]


class _Output(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: list[Any]


class _Inference(msgspec.Struct):
    outputs: list[_Output]


def _classify_body(texts: Sequence[str]) -> Any:
    return {"texts": texts}


def _classify_answers(content: bytes) -> int | None:
    """Take a list of objects, one a text, as the whole document or under ``predictions``."""
    answer = _decode(content, _Predictions | list[dict[str, Any]])
    if answer is None:
        return None
    return len(answer.predictions if isinstance(answer, _Predictions) else answer)


def _v2_body(texts: Sequence[str]) -> Any:
    """Follow the Open Inference Protocol's JSON form, texts as BYTES."""
    one_input = {"name": "text", "shape": [len(texts)], "datatype": "BYTES", "data": texts}
    return {"inputs": [one_input]}


def _v2_answers(content: bytes) -> int | None:
    """Count the rows of every output; None where two outputs have unequal numbers of them."""
    answer = _decode(content, _Inference)
    if answer is None:
        return None
    rows = {output.shape[0] if output.shape else 0 for output in answer.outputs}
    return rows.pop() if len(rows) == 1 else None


def _decode(content: bytes, shape: Any) -> Any:
    try:
        return msgspec.json.decode(content, type=shape)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


PROTOCOLS = {
    "classify": Protocol(_classify_body, _classify_answers),
    "v2": Protocol(_v2_body, _v2_answers),
}


def guess_protocol(url: str) -> str:
    """Return "v2" for a path that ends in /infer, "classify" for any other."""
    return "v2" if split_url(url).path.rstrip("/").endswith("/infer") else "classify"


def public_url(url: str) -> str:
    """Return the URL without what may be secret: user, password and query."""
    parts = split_url(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def split_url(url: str) -> SplitResult:
    """Split a server's URL; raises ``InputError`` if it is invalid, without its secrets."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # an invalid port, a bracket that is not closed
        sound = False
    if not sound:
        raise InputError(
            "this is not the URL of a server; give one as http://127.0.0.1:8000/classify."
        )
    return parts

"""The admin application: which models are served, and a new version of one.

It follows Triton's model repository extension of the Open Inference Protocol. It listens on an
address of its own, so that clients that may ask for predictions cannot change the models.
"""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.responses import Response

from trainkit.serve.errors import InputError, TrainkitError
from trainkit.serve.http.exceptions import HTTPError
from trainkit.serve.http.middleware import read_body
from trainkit.serve.http.operations import Call, Operation, application_of

T = TypeVar("T")

MAX_BYTES = 1 << 16
INDEX = "/v2/repository/index"
LOAD = "/v2/repository/models/{model}/load"


class Entry(msgspec.Struct, frozen=True):
    """One model of the index, in Triton's words: ``state`` is READY or UNAVAILABLE."""

    name: str
    version: str
    state: str
    reason: str = ""


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``folder``: the bundle to load; None: the folder that the model was loaded from."""

    folder: str | None = None


class LoadBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of a load."""

    parameters: Parameters = Parameters()


class IndexBody(msgspec.Struct, frozen=True):
    """Body of an index; with ``ready`` only models that are."""

    ready: bool = False


def application(
    index: Callable[[], Sequence[Entry]],
    load: Callable[[str, Path | None], Awaitable[str]],
    token: str | None = None,
) -> Starlette:
    """Build the application around two functions; ``load`` returns the new version."""

    async def repository_index(call: Call) -> Response:
        wanted = await _body(call, IndexBody)
        entries = [one for one in index() if one.state == "READY" or not wanted.ready]
        return _json(entries)

    async def repository_load(call: Call) -> Response:
        name = call.model or ""
        wanted = await _body(call, LoadBody)
        if name not in {entry.name for entry in index()}:
            raise HTTPError(404, f"no model is named {name!r}.")
        folder = wanted.parameters.folder
        try:
            version = await load(name, None if folder is None else Path(folder))
        except TrainkitError as error:
            status = 400 if isinstance(error, InputError) else 503
            raise HTTPError(status, str(error)) from None
        return _json({"name": name, "version": version, "state": "READY"})

    operations = [
        Operation("POST", INDEX, "The models", repository_index, "application/json"),
        Operation("POST", LOAD, "Load a version", repository_load, "application/json"),
    ]
    hint = f"there are {INDEX} and {LOAD.format(model='NAME')}"
    return application_of(operations, token=token, paths_hint=hint)


def _json(content: list[Entry] | dict[str, str]) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


async def _body(call: Call, kind: type[T]) -> T:
    """Read a small JSON body; an empty one is an empty object."""
    content = await read_body(call.scope, call.receive, MAX_BYTES)
    try:
        return msgspec.json.decode(content or b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HTTPError(400, f"the body is not what was expected: {error}.") from None

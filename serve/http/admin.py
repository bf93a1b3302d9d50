"""The admin application: which models are served, and a new version of one.

It follows Triton's model repository extension to the Open Inference Protocol, and listens on an
address of its own, so that whoever may ask for predictions may not also change what gives them.
"""

import hmac
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from trainkit.serve.errors import InputError, TrainkitError

__all__ = ["Entry", "application"]

MOST_BYTES = 1 << 16

log = logging.getLogger("trainkit.serve")


class Entry(msgspec.Struct, frozen=True):
    """One model of the index, in Triton's words: ``state`` is READY or UNAVAILABLE."""

    name: str
    version: str
    state: str
    reason: str = ""


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``folder``: the bundle to load; without it, the folder that the model came from."""

    folder: str | None = None


class LoadBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of a load."""

    parameters: Parameters = Parameters()


class IndexBody(msgspec.Struct, frozen=True):
    """Body of an index; ``ready`` leaves out what is not."""

    ready: bool = False


class RequestMiddleware:
    """Demands the token, where there is one."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self.app = app
        self.expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer 401."""
        given = dict(scope.get("headers", [])).get(b"authorization", b"")
        if self.expected is None or hmac.compare_digest(given, self.expected):
            await self.app(scope, receive, send)
            return
        answer = said(401, "this address needs the header Authorization: Bearer TOKEN.")
        answer.headers["WWW-Authenticate"] = "Bearer"
        await answer(scope, receive, send)


def application(
    index: Callable[[], Sequence[Entry]],
    load: Callable[[str, Path | None], Awaitable[str]],
    token: str | None = None,
) -> Starlette:
    """Build the application around two functions; ``load`` returns the new version."""

    async def repository_index(request: Request) -> Response:
        wanted = await body(request, IndexBody)
        entries = [one for one in index() if one.state == "READY" or not wanted.ready]
        return JSONResponse([msgspec.to_builtins(entry) for entry in entries])

    async def repository_load(request: Request) -> Response:
        name = request.path_params["name"]
        wanted = await body(request, LoadBody)
        if name not in {entry.name for entry in index()}:
            return said(404, f"no model is named {name!r}.")
        folder = wanted.parameters.folder
        version = await load(name, None if folder is None else Path(folder))
        return JSONResponse({"name": name, "version": version, "state": "READY"})

    return Starlette(
        routes=[
            Route("/v2/repository/index", repository_index, methods=["POST"]),
            Route("/v2/repository/models/{name}/load", repository_load, methods=["POST"]),
        ],
        middleware=[Middleware(RequestMiddleware, token=token)],
        exception_handlers={
            HTTPException: no_such_route,
            TrainkitError: refused,
            Exception: failed,
        },
    )


async def body(request: Request, kind: type[Any]) -> Any:
    """Read a small JSON body; none at all is an empty one. ``InputError`` where it is wrong."""
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > MOST_BYTES:
            raise InputError(f"the body is larger than {MOST_BYTES} bytes.")
    try:
        return msgspec.json.decode(content or b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"the body is not what was expected: {error}.") from None


def said(status: int, error: str) -> JSONResponse:
    """Answer with one sentence."""
    return JSONResponse({"error": error}, status)


async def no_such_route(request: Request, error: Exception) -> Response:
    """404 or 405, in the one form that every error has."""
    assert isinstance(error, HTTPException)
    answer = said(error.status_code, f"{request.method} {request.url.path}: {error.detail}.")
    answer.headers.update(error.headers or {})
    return answer


async def refused(request: Request, error: Exception) -> Response:
    """Answer for a bundle or a body that is not sound (400), or a worker's own failure (503)."""
    return said(400 if isinstance(error, InputError) else 503, str(error))


async def failed(request: Request, error: Exception) -> Response:
    """Answer for our own mistake; Starlette raises it again, and it is logged there."""
    return said(500, "an internal error; see the server's log.")

"""Operations: each is one method of one path, with its handler, its messages and its errors.

Routes (:func:`application_of`) and the OpenAPI description (:mod:`trainkit.serve.http.openapi`) are
made from the same list. Errors are answered here, always as ``{"error": "..."}``.
"""

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from trainkit.serve.errors import InputError
from trainkit.serve.http.exceptions import (
    DeadlineError,
    HTTPError,
    InferenceError,
    QueueFullError,
    UnavailableError,
)
from trainkit.serve.http.messages import Error
from trainkit.serve.http.middleware import LOGGER, RequestLog, RequestMiddleware, json_response
from trainkit.serve.http.tensors import ProtocolError


class Call(NamedTuple):
    """One request, as a handler sees it."""

    scope: Scope
    receive: Receive
    log: RequestLog
    model: str | None  # of the path
    version: str | None


Handler = Callable[[Call], Awaitable[Response]]


class Operation(NamedTuple):
    """One method of one path."""

    method: str
    path: str
    summary: str
    handler: Handler
    response: type | str  # a struct, or a content type
    request: type | None = None
    errors: tuple[int, ...] = ()
    binary: bool = False  # request and response may carry binary tensor data
    unready: bool = False  # status 503 has the same body as 200
    public: bool = False  # needs no token


class Endpoint:
    """An operation as an ASGI application."""

    def __init__(self, operation: Operation) -> None:
        self.path = operation.path
        self.handler = operation.handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path = scope["path_params"]
        call = Call(scope, receive, scope["trainkit.log"], path.get("model"), path.get("version"))
        response = await self.handler(call)
        await response(scope, receive, send)


def application_of(
    operations: Sequence[Operation],
    middleware: Sequence[Middleware] = (),
    *,
    token: str | None = None,
    draining: Callable[[], bool] = lambda: False,
    observe: Callable[[RequestLog], None] = lambda log: None,
    paths_hint: str = "see /openapi.json",
) -> Starlette:
    """Build an application with these routes; ``middleware`` goes around that of every request."""
    public = frozenset(operation.path for operation in operations if operation.public)

    async def on_error(request: Request, error: Exception) -> Response:
        log: RequestLog = request.scope["trainkit.log"]
        log.error, status, message, headers = _answer_to(error, paths_hint)
        if isinstance(error, InferenceError | UnavailableError):  # the client gets less detail
            fields = {"request_id": log.request_id}
            LOGGER.warning("%s: %s", log.error, error, extra={"fields": fields})
        return json_response(Error(message), status, headers)

    expected = (HTTPException, HTTPError, ProtocolError, InputError, QueueFullError)
    app = Starlette(
        routes=[Route(one.path, Endpoint(one), methods=[one.method]) for one in operations],
        exception_handlers=dict.fromkeys(
            (*expected, DeadlineError, UnavailableError, InferenceError), on_error
        ),
        middleware=[
            *middleware,
            Middleware(
                RequestMiddleware, token=token, public=public, draining=draining, observe=observe
            ),
        ],
    )
    app.router.redirect_slashes = False
    return app


def _answer_to(error: Exception, paths_hint: str) -> tuple[str, int, str, Mapping[str, str]]:
    """Return the kind of an expected error for the log, the status, the sentence and headers."""
    match error:
        case HTTPException(status_code=405):
            allow = ", ".join(sorted((error.headers or {})["Allow"].split(", ")))
            return "", 405, f"this path takes {allow} only.", {"Allow": allow}
        case HTTPException():
            return "", error.status_code, f"there is no such path; {paths_hint}.", {}
        case HTTPError():
            return f"refused {error.status}", error.status, str(error), error.headers
        case ProtocolError():
            return "protocol", error.status, str(error), {}
        case InputError():
            return "input", 422, str(error), {}
        case QueueFullError():
            retry = str(max(1, math.ceil(error.retry_after_s)))
            return "queue full", 429, str(error), {"Retry-After": retry}
        case DeadlineError():
            message = "the deadline passed before the request was run; try again later."
            return "deadline", 504, message, {}
        case UnavailableError():
            message = "the model is stopping or restarting; try again."
            return "unavailable", 503, message, {"Retry-After": "1"}
    return "inference", 500, "the model fails on this input.", {}

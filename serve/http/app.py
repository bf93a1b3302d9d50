"""The HTTP application: Open Inference Protocol v2, ``/classify`` for people, metrics, a page.

Here are the routes and what answers for errors, which are always ``{"error": "..."}``; the handlers
are in ``handlers``.
"""

import math
from collections.abc import Callable

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as StarletteRequest
from starlette.responses import Response as StarletteResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from trainkit.serve.errors import InputError
from trainkit.serve.http import metrics, openapi
from trainkit.serve.http.exceptions import (
    DeadlineError,
    InferenceError,
    QueueFullError,
    UnavailableError,
)
from trainkit.serve.http.handlers import Call, Handler, Handlers
from trainkit.serve.http.inference_protocol import ProtocolError
from trainkit.serve.http.middleware import (
    LOGGER,
    HTTPError,
    RequestLog,
    RequestMiddleware,
    Response,
    error_response,
)
from trainkit.serve.http.model import Models
from trainkit.serve.http.page import page
from trainkit.serve.http.settings import Settings

__all__ = ["application"]


class Endpoint:
    """A route as an ASGI application: a handler, and answers for what it raises."""

    def __init__(self, template: str, handler: Handler) -> None:
        self.template = template
        self.handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        record: RequestLog = scope["trainkit.record"]
        path = scope["path_params"]
        try:
            call = Call(scope, receive, record, path.get("model"), path.get("version"))
            reply = await self.handler(call)
        except Exception as error:
            found = _reply_to(error)
            if found is None:
                raise
            record.error, reply = found
            if isinstance(error, InferenceError | UnavailableError):  # told to the client in short
                fields = {"request_id": record.request_id}
                LOGGER.warning("%s: %s", record.error, error, extra={"fields": fields})
        await reply.send(send)


def _reply_to(error: Exception) -> tuple[str, Response] | None:
    """Return the kind of an error that is expected, and the answer to it."""
    match error:
        case HTTPError():
            return f"refused {error.status}", error_response(
                error.status, str(error), error.headers
            )
        case ProtocolError():
            return "protocol", error_response(error.status, str(error))
        case InputError():
            return "input", error_response(422, str(error))
        case QueueFullError():
            retry = [("Retry-After", str(max(1, math.ceil(error.retry_after_s))))]
            return "queue full", error_response(429, str(error), retry)
        case DeadlineError():
            message = "the deadline passed before the request was run; try again later."
            return "deadline", error_response(504, message)
        case UnavailableError():
            message = "the model is stopping or restarting; try again."
            return "unavailable", error_response(503, message, [("Retry-After", "1")])
        case InferenceError():
            return "inference", error_response(500, "the model fails on this input.")
    return None


def application(
    models: Models,
    settings: Settings,
    *,
    token: str | None = None,
    draining: Callable[[], bool] = lambda: False,
    otel: bool = False,
) -> Starlette:
    """Build the application around running models, which stay their owner's to close.

    With ``token`` every request but the health probes and the page must carry it. While
    ``draining`` answers true, the server is not ready and its answers close their connections.
    """
    handlers = Handlers(models, settings, draining, metrics.Tracing(otel))
    models.observe(handlers.observe_batch)
    routes = [
        Route(template, Endpoint(template, handler), methods=[method])
        for method, template, handler in handlers.table()
    ]
    document = msgspec.json.encode(
        openapi.document(
            token=token is not None, version=handlers.server.version, limits=settings.limits
        )
    )
    for template, reply in (("/openapi.json", Response(200, document)), ("/", page())):
        routes.append(Route(template, Endpoint(template, _fixed(reply)), methods=["GET"]))
    app = Starlette(
        routes=routes,
        exception_handlers={HTTPException: _http_error},
        middleware=[
            Middleware(handlers.tracing.around),  # outside the guard: no exception gets so far
            Middleware(RequestMiddleware, token=token, draining=draining, observe=handlers.observe),
        ],
    )
    app.router.redirect_slashes = False
    return app


def _fixed(reply: Response) -> Handler:
    async def handler(call: Call) -> Response:
        return reply

    return handler


async def _http_error(request: StarletteRequest, error: Exception) -> StarletteResponse:
    """Answer a path or method that there is not."""
    assert isinstance(error, HTTPException)
    message, headers = "there is no such path; see /openapi.json.", {}
    if error.status_code == 405:
        allow = ", ".join(sorted((error.headers or {})["Allow"].split(", ")))
        message, headers = f"this path takes {allow} only.", {"Allow": allow}
    reply = error_response(error.status_code, message)
    return StarletteResponse(reply.body, reply.status, headers, reply.content_type)

"""The HTTP application: Open Inference Protocol v2, ``/classify`` for people, metrics, a page."""

from collections.abc import Callable

import msgspec
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import Response

from trainkit import __version__
from trainkit.serve.http import messages, openapi
from trainkit.serve.http.handlers import Handlers
from trainkit.serve.http.inference_protocol import InferRequest, InferResponse
from trainkit.serve.http.metrics import Tracing
from trainkit.serve.http.model import Models
from trainkit.serve.http.operations import Call, Handler, Operation, application_of
from trainkit.serve.http.page import page
from trainkit.serve.http.settings import Limits, Settings

V2 = "/v2/models/{model}"
WORK = (400, 404, 408, 413, 415, 422, 429, 500, 503, 504)  # errors of a request that runs a model


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
    ``draining`` returns true, the server is not ready and its answers close their connections.
    """
    tracing = Tracing(otel)
    handlers = Handlers(models, settings, draining, tracing)
    models.observe(handlers.observe_batch)
    return application_of(
        operations_of(handlers, settings.limits, token=token is not None),
        [Middleware(tracing.around)],  # outside the other: no exception gets so far
        token=token,
        draining=draining,
        observe=handlers.observe,
    )


def operations_of(handlers: Handlers, limits: Limits, *, token: bool) -> list[Operation]:
    """Return every operation, in the order in which routes are tried."""
    one, m = Operation, messages
    operations = [
        one(
            "POST",
            "/classify",
            "Classify texts or pairs",
            handlers.classify,
            m.ClassifyResponse,
            m.ClassifyRequest,
            WORK,
        ),
        one("GET", "/v2", "The server", handlers.about, m.ServerMetadata),
        one(
            "GET",
            "/v2/health/live",
            "Whether the process answers",
            handlers.live,
            m.Live,
            public=True,
        ),
        one(
            "GET",
            "/v2/health/ready",
            "Whether requests are taken",
            handlers.ready,
            m.Ready,
            unready=True,
            public=True,
        ),
        one("GET", "/models", "What is served", handlers.facts, m.ModelList),
        one("GET", "/metrics", "Metrics for Prometheus", handlers.metrics, "text/plain"),
        one("GET", "/", "A page to try the models", _fixed(page()), "text/html", public=True),
    ]
    for path in (V2, V2 + "/versions/{version}"):
        operations += _of_model(path, handlers)

    async def description(call: Call) -> Response:
        return Response(encoded, media_type="application/json")

    operations.append(
        one("GET", "/openapi.json", "This description", description, "application/json")
    )
    encoded = msgspec.json.encode(
        openapi.document(operations, token=token, version=__version__, limits=limits)
    )
    return operations


def _of_model(path: str, handlers: Handlers) -> list[Operation]:
    """Return the operations of the Open Inference Protocol on the model at ``path``."""
    one, m = Operation, messages
    return [
        one(
            "POST",
            f"{path}/infer",
            "Infer",
            handlers.infer,
            InferResponse,
            InferRequest,
            WORK,
            binary=True,
        ),
        one(
            "GET",
            path,
            "A model's tensors",
            handlers.model_metadata,
            m.ModelMetadata,
            errors=(404,),
        ),
        one(
            "GET",
            f"{path}/ready",
            "Whether a model answers",
            handlers.model_ready,
            m.ModelReady,
            errors=(404,),
            unready=True,
        ),
    ]


def _fixed(response: Response) -> Handler:
    async def handler(call: Call) -> Response:
        return response

    return handler

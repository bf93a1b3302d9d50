"""What goes in and out of every route, as structs, and the OpenAPI description made from them."""

import copy
from typing import Annotated, Any

import msgspec

from trainkit.serve.http.inference_protocol import InferRequest, InferResponse
from trainkit.serve.http.middleware import Error
from trainkit.serve.http.settings import Limits

__all__ = [
    "V2",
    "VERSION",
    "Classified",
    "ClassifyRequest",
    "ClassifyResponse",
    "Live",
    "ModelInfo",
    "ModelList",
    "ModelMetadata",
    "ModelReady",
    "Ready",
    "ServerMetadata",
    "TensorMetadata",
    "Timings",
    "document",
]

V2 = "/v2/models/{model}"
VERSION = V2 + "/versions/{version}"


class ClassifyRequest(msgspec.Struct, forbid_unknown_fields=True):
    """What ``/classify`` takes; a text may be a pair."""

    texts: list[str | tuple[str, str]]
    model: str | None = None  # the first one served
    top_k: Annotated[int, msgspec.Meta(ge=1)] | None = None
    thresholds: float | dict[str, float] | None = None  # of a multi-label model


class Classified(msgspec.Struct, omit_defaults=True):
    """What is said of a text: ``scores`` best first where ``top_k`` was given.

    ``labels``, only with thresholds: those above theirs, best first.
    """

    label: str
    score: float
    scores: dict[str, float]
    truncated: bool
    labels: list[str] | msgspec.UnsetType = msgspec.UNSET


class Timings(msgspec.Struct):
    """Where the time went, in milliseconds; ``total`` is since the request's first byte."""

    tokenize: float
    queue: float
    infer: float
    total: float


class ClassifyResponse(msgspec.Struct):
    """What ``/classify`` answers, in the order of the texts."""

    model: str
    version: str
    predictions: list[Classified]
    timings_ms: Timings


class ModelInfo(msgspec.Struct):
    """What the page says of a model."""

    name: str
    version: str
    ready: bool
    labels: tuple[str, ...]
    problem_type: str
    precision: str
    max_length: int
    pooling: str
    source: str
    notes: tuple[str, ...]


class ModelList(msgspec.Struct):
    """Every model that is served, the default one first."""

    models: list[ModelInfo]


class Live(msgspec.Struct):
    """The process answers."""

    live: bool


class Ready(msgspec.Struct):
    """All models answer, and the server takes requests."""

    ready: bool


class ModelReady(msgspec.Struct):
    """Whether one model answers."""

    name: str
    ready: bool


class ServerMetadata(msgspec.Struct):
    """The server, in the protocol's words."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(msgspec.Struct):
    """An input or output; -1 is an axis of any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(msgspec.Struct):
    """A model, in the protocol's words: ``text``, or all of the other inputs."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


REFUSALS = {
    400: "The request is malformed.",
    401: "The token is missing or wrong.",
    404: "There is no such model or version.",
    408: "The body did not come in time.",
    413: "The body, or all texts together, are too large.",
    415: "The Content-Encoding is none of gzip, deflate and identity.",
    422: "There are too many texts or tokens, or a text is empty.",
    429: "The queue is full; Retry-After says when to try again.",
    500: "The model fails on this input.",
    503: "Not ready, or stopping.",
    504: "The deadline passed before the request was run.",
}
MESSAGES = (
    ClassifyRequest,
    ClassifyResponse,
    Error,
    InferRequest,
    InferResponse,
    Live,
    ModelList,
    ModelMetadata,
    ModelReady,
    Ready,
    ServerMetadata,
)
OF_WORK = (400, 404, 408, 413, 415, 422, 429, 500, 503, 504)
BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


def document(*, token: bool, version: str, limits: Limits) -> dict[str, Any]:
    """Return the OpenAPI 3.1 description; with ``token``, requests must be authorised."""
    components: dict[str, Any] = {"schemas": _schemas(limits)}
    if token:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "trainkit",
            "version": version,
            "description": "Text classification: the Open Inference Protocol v2, and /classify.",
        },
        "paths": _paths(token),
        "components": components,
    }


def _schemas(limits: Limits) -> dict[str, Any]:
    _, schemas = msgspec.json.schema_components(
        MESSAGES, ref_template="#/components/schemas/{name}"
    )
    texts = schemas["ClassifyRequest"]["properties"]["texts"]
    texts |= {"minItems": 1, "maxItems": limits.texts}
    return schemas


def _paths(token: bool) -> dict[str, Any]:
    paths: dict[str, Any] = {
        "/": {"get": _answers("A page to try the models", {"text/html": {}})},
        "/openapi.json": {"get": _answers("This description", {"application/json": {}})},
        "/metrics": {"get": _answers("Metrics for Prometheus", {"text/plain": {}})},
        "/models": {"get": _answers("What is served", _json(ModelList))},
        "/classify": {"post": _work("Classify texts or pairs", ClassifyRequest, ClassifyResponse)},
        "/v2": {"get": _answers("The server", _json(ServerMetadata))},
        V2: _of_model(_answers("A model's tensors", _json(ModelMetadata), 404)),
        f"{V2}/ready": _of_model(_answers("Whether a model answers", _json(ModelReady), 404)),
        f"{V2}/infer": _of_model(post=_work("Infer", InferRequest, InferResponse, BINARY)),
    }
    _or_not_ready(paths[f"{V2}/ready"]["get"], ModelReady)
    for path in (V2, f"{V2}/ready", f"{V2}/infer"):
        item = copy.deepcopy(paths[path])
        item["parameters"].append(_parameter("version", "path", {"type": "string"}))
        paths[path.replace(V2, VERSION)] = item
    if token:
        for path, item in paths.items():
            if path == "/":
                continue
            operation = item.get("get") or item["post"]
            operation["security"] = [{"token": []}]
            operation["responses"]["401"] = _refused(401)
    ready = _or_not_ready(_answers("Whether requests are taken", _json(Ready)), Ready)
    live = _answers("Whether the process answers", _json(Live))
    return paths | {"/v2/health/live": {"get": live}, "/v2/health/ready": {"get": ready}}


def _of_model(
    get: dict[str, Any] | None = None, post: dict[str, Any] | None = None
) -> dict[str, Any]:
    item = {"get": get} if get else {"post": post}
    return item | {"parameters": [_parameter("model", "path", {"type": "string"})]}


def _or_not_ready(operation: dict[str, Any], answer: type) -> dict[str, Any]:
    operation["responses"]["503"] = {"description": REFUSALS[503], "content": _json(answer)}
    return operation


def _answers(summary: str, content: dict[str, Any], *refused: int) -> dict[str, Any]:
    success = {"description": "As asked for.", "content": content}
    responses = {str(status): _refused(status) for status in refused}
    return {"summary": summary, "responses": {"200": success} | responses}


def _work(
    summary: str, request: type, answer: type, other: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Describe a route that runs the model; ``other``: content both ways beside JSON."""
    operation = _answers(summary, _json(answer) | (other or {}), *OF_WORK)
    operation["requestBody"] = {"required": True, "content": _json(request) | (other or {})}
    milliseconds = {"type": "number", "exclusiveMinimum": 0, "maximum": 1e9}
    operation["parameters"] = [_parameter("X-Request-Timeout-Ms", "header", milliseconds)]
    if other:
        length = {"type": "integer", "minimum": 0}
        operation["parameters"].append(
            _parameter("Inference-Header-Content-Length", "header", length)
        )
    return operation


def _parameter(name: str, where: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": where, "required": where == "path", "schema": schema}


def _refused(status: int) -> dict[str, Any]:
    found: dict[str, Any] = {"description": REFUSALS[status], "content": _json(Error)}
    if status == 429:
        found["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "required": True}}
    return found


def _json(struct: type) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{struct.__name__}"}}}

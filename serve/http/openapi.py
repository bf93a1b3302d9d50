"""The OpenAPI 3.1 description, made from the operations and their messages."""

from collections.abc import Sequence
from typing import Any

import msgspec

from trainkit.serve.http.messages import Error
from trainkit.serve.http.operations import Operation
from trainkit.serve.http.settings import Limits

ERRORS = {
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
BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


def document(
    operations: Sequence[Operation], *, token: bool, version: str, limits: Limits
) -> dict[str, Any]:
    """Return the description; with ``token``, requests must be authorised."""
    components: dict[str, Any] = {"schemas": _schemas(operations, limits)}
    if token:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    paths: dict[str, Any] = {}
    for operation in operations:
        item = paths.setdefault(operation.path, {})
        item[operation.method.lower()] = _described(operation, token and not operation.public)
        names = [name for name in ("model", "version") if f"{{{name}}}" in operation.path]
        if names:
            item["parameters"] = [_parameter(name, "path", {"type": "string"}) for name in names]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "trainkit",
            "version": version,
            "description": "Text classification: the Open Inference Protocol v2, and /classify.",
        },
        "paths": paths,
        "components": components,
    }


def _schemas(operations: Sequence[Operation], limits: Limits) -> dict[str, Any]:
    messages = {struct for one in operations for struct in (one.request, one.response)}
    structs = [struct for struct in messages if isinstance(struct, type)]
    _, schemas = msgspec.json.schema_components(
        [Error, *structs], ref_template="#/components/schemas/{name}"
    )
    texts = schemas["ClassifyRequest"]["properties"]["texts"]
    texts |= {"minItems": 1, "maxItems": limits.texts}
    return schemas


def _described(operation: Operation, secured: bool) -> dict[str, Any]:
    binary = BINARY if operation.binary else {}
    responses = {
        "200": {"description": "As asked for.", "content": _content(operation.response) | binary}
    }
    for status in (*operation.errors, *((401,) if secured else ())):
        responses[str(status)] = _error(status)
    if operation.unready:
        responses["503"] = {"description": ERRORS[503], "content": _content(operation.response)}
    described: dict[str, Any] = {"summary": operation.summary, "responses": responses}
    if secured:
        described["security"] = [{"token": []}]
    if operation.request:
        described["requestBody"] = {
            "required": True,
            "content": _content(operation.request) | binary,
        }
        milliseconds = {"type": "number", "exclusiveMinimum": 0, "maximum": 1e9}
        described["parameters"] = [_parameter("X-Request-Timeout-Ms", "header", milliseconds)]
    if operation.binary:
        length = {"type": "integer", "minimum": 0}
        described["parameters"].append(
            _parameter("Inference-Header-Content-Length", "header", length)
        )
    return described


def _parameter(name: str, where: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": where, "required": where == "path", "schema": schema}


def _error(status: int) -> dict[str, Any]:
    described: dict[str, Any] = {"description": ERRORS[status], "content": _content(Error)}
    if status == 429:
        described["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "required": True}}
    return described


def _content(message: type | str) -> dict[str, Any]:
    if isinstance(message, str):
        return {message: {}}
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{message.__name__}"}}}

"""Bodies of requests and responses other than those of an inference, as structs."""

from typing import Annotated

import msgspec


class Error(msgspec.Struct):
    """The body of every answer that is not a success."""

    error: str


class ClassifyRequest(msgspec.Struct, forbid_unknown_fields=True):
    """What ``/classify`` takes; a text may be a pair."""

    texts: list[str | tuple[str, str]]
    model: str | None = None  # the first one served
    top_k: Annotated[int, msgspec.Meta(ge=1)] | None = None
    thresholds: float | dict[str, float] | None = None  # of a multi-label model


class Classified(msgspec.Struct, omit_defaults=True):
    """The prediction of a text: ``scores`` best first if ``top_k`` was given.

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

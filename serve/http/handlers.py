"""The handlers of the HTTP application: each takes a call and gives a reply, or raises.

Inference for programs and for people, what the models are and whether they are ready, and the
metrics. What a request may be is in ``guard``, ``inference_protocol`` and ``classify``, the work in
``model``.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import msgspec
from starlette.types import Receive, Scope

from trainkit import __version__
from trainkit.serve.http import classify, metrics
from trainkit.serve.http import inference_protocol as protocol
from trainkit.serve.http.answering import Answering
from trainkit.serve.http.middleware import (
    HTTPError,
    RequestLog,
    Response,
    header,
    header_timeout_s,
    read_body,
    unless_gone,
)
from trainkit.serve.http.model import BatchStats, Model, Models
from trainkit.serve.http.openapi import (
    V2,
    VERSION,
    ClassifyResponse,
    Live,
    ModelInfo,
    ModelList,
    ModelMetadata,
    ModelReady,
    Ready,
    ServerMetadata,
    TensorMetadata,
    Timings,
)
from trainkit.serve.http.settings import Settings
from trainkit.serve.postprocess import probabilities

__all__ = ["Call", "Handler", "Handlers"]

T = TypeVar("T")
LONG = 1 << 16  # bytes of a body: reading more takes longer than the hop to a thread
MANY = 64  # rows: likewise
AT_HAND_S = 0.1  # a body that came with the request is read, whatever the deadline
BINARY = "application/octet-stream"


class Call(NamedTuple):
    """One request, as a handler sees it."""

    scope: Scope
    receive: Receive
    record: RequestLog
    model: str | None  # of the path
    version: str | None


Handler = Callable[[Call], Awaitable[Response]]


class Handlers:
    """The handlers, and what they share."""

    def __init__(
        self,
        models: Models,
        settings: Settings,
        draining: Callable[[], bool],
        tracing: metrics.Tracing,
    ) -> None:
        self.models = models
        self.settings = settings
        self.draining = draining
        self.tracing = tracing
        self.answering = Answering(settings, tracing)
        self._noted: WeakKeyDictionary[Model, dict[str, int]] = WeakKeyDictionary()
        self.server = ServerMetadata(
            "trainkit", __version__, ["binary_tensor_data", "schedule_policy"]
        )

    def table(self) -> list[tuple[str, str, Handler]]:
        """Return method, path and handler of every route that asks the models."""
        return [  # in the order in which they are tried
            ("POST", "/classify", self.classify),
            *(("POST", f"{path}/infer", self.infer) for path in (V2, VERSION)),
            ("GET", "/v2", self.about),
            ("GET", "/v2/health/live", self.live),
            ("GET", "/v2/health/ready", self.ready),
            *(("GET", path, self.model_metadata) for path in (V2, VERSION)),
            *(("GET", f"{path}/ready", self.model_ready) for path in (V2, VERSION)),
            ("GET", "/models", self.facts),
            ("GET", "/metrics", self.metrics),
        ]

    def observe(self, record: RequestLog) -> None:
        """Count a request that was answered."""
        metrics.of(metrics.REQUESTS, record.route, record.model, record.status).inc()
        if record.error:
            metrics.of(metrics.ERRORS, record.error).inc()
        if record.infer_s is not None:
            metrics.of(metrics.TOKENIZE, record.model).observe(record.tokenize_s or 0)
            metrics.of(metrics.QUEUE, record.model).observe(record.queue_s or 0)
            metrics.of(metrics.INFER, record.model).observe(record.infer_s)

    def observe_batch(self, model: Model, facts: BatchStats) -> None:
        """Count a batch that was run."""
        metrics.of(metrics.BATCH_ROWS, model.name).observe(facts.rows)
        metrics.of(metrics.BATCH_TOKENS, model.name).observe(facts.tokens)
        self._note(model)

    def _note(self, model: Model) -> None:
        """Set the gauges where they changed; a model is asked after each batch."""
        stats = model.stats()
        if self._noted.get(model) == stats:
            return
        self._noted[model] = stats
        metrics.of(metrics.QUEUE_ROWS, model.name).set(stats["queued_rows"])
        metrics.of(metrics.QUEUE_TOKENS, model.name).set(stats["queued_tokens"])
        metrics.of(metrics.RESTARTS, model.name).set(stats["restarts"])
        metrics.set_version(model.name, self.models[model.name].version)

    async def about(self, call: Call) -> Response:
        """Describe the server."""
        return _json(self.server)

    async def live(self, call: Call) -> Response:
        """Tell that the process answers."""
        return _json(Live(True))

    async def ready(self, call: Call) -> Response:
        """Tell whether every model takes requests."""
        ready = not self.draining() and all(model.ready for model in self.models.values())
        return _json(Ready(ready), 200 if ready else 503)

    async def model_ready(self, call: Call) -> Response:
        """Tell whether one model takes requests."""
        model = self._model(call)
        ready = model.ready and not self.draining()
        return _json(ModelReady(model.name, ready), 200 if ready else 503)

    async def model_metadata(self, call: Call) -> Response:
        """Describe what a model takes and gives."""
        model = self._model(call)
        ids = (TensorMetadata(name, "INT64", [-1, -1]) for name in _signature(model, 0).id_inputs)
        columns = len(model.manifest.labels)
        outputs = [
            TensorMetadata(name, datatype, [-1] if name == "label" else [-1, columns])
            for name, datatype in protocol.OUTPUTS.items()
        ]
        inputs = [TensorMetadata("text", "BYTES", [-1]), *ids]
        versions = [model.version]
        return _json(ModelMetadata(model.name, versions, "onnxruntime_onnx", inputs, outputs))

    async def facts(self, call: Call) -> Response:
        """Describe every model, for people."""
        return _json(ModelList([_facts(model) for model in self.models.values()]))

    async def metrics(self, call: Call) -> Response:
        """Give the metrics as Prometheus reads them."""
        for model in self.models.values():
            self._note(model)
        body = await asyncio.to_thread(metrics.exposition)
        return Response(200, body, "text/plain; version=0.0.4; charset=utf-8")

    async def infer(self, call: Call) -> Response:
        """Answer a request of the Open Inference Protocol."""
        self._model(call)
        timeout_s = header_timeout_s(call.scope)
        body = await self._body(call, timeout_s)
        model = self._model(call)  # again: a reload may have come while the body did
        length = _header_length(call.scope)
        signature = _signature(model, self.settings.limits.texts)
        request = await _threaded(len(body) > LONG, protocol.decode, body, length, signature)
        if request.timeout_s is not None:
            timeout_s = min(timeout_s, request.timeout_s)
        work = self.answering.infer(call.record, model, request.texts, request.rows, timeout_s)
        rows, logits = await unless_gone(call.receive, work)
        classifier = model.classifier
        scores = probabilities(logits, classifier.problem_type, classifier.temperature)
        name = (model.name, model.version)
        answer, length = await _threaded(
            len(rows) > MANY, protocol.encode, request, name, classifier.labels, logits, scores
        )
        if length is None:
            return Response(200, answer)
        headers = (("Inference-Header-Content-Length", str(length)),)
        return Response(200, answer, BINARY, headers)

    async def classify(self, call: Call) -> Response:
        """Answer texts with labels."""
        timeout_s = header_timeout_s(call.scope)
        body = await self._body(call, timeout_s)
        request = await _threaded(len(body) > LONG, classify.decode, body)
        name = request.model or next(iter(self.models))
        model = self._model(call._replace(model=name))
        thresholds = classify.thresholds_of(request, model)
        work = self.answering.infer(call.record, model, request.texts, None, timeout_s)
        rows, logits = await unless_gone(call.receive, work)
        found = await _threaded(
            len(rows) > MANY, classify.predictions, model, rows, logits, request.top_k, thresholds
        )
        record = call.record
        total_s = time.perf_counter() - record.started
        parts_s = (record.tokenize_s or 0, record.queue_s or 0, record.infer_s or 0, total_s)
        timings = Timings(*(round(part * 1000, 3) for part in parts_s))
        return _json(ClassifyResponse(model.name, model.version, found, timings))

    async def _body(self, call: Call, timeout_s: float) -> bytes:
        """Read the body; who sends it slowly has until the request's deadline."""
        deadline = call.record.started + min(timeout_s, self.settings.timeout_s)
        try:
            async with asyncio.timeout(max(deadline - time.perf_counter(), AT_HAND_S)):
                return await read_body(call.scope, call.receive, self.settings.limits.body_bytes)
        except TimeoutError:
            message = "the body did not come before the deadline; send it at once."
            raise HTTPError(408, message, Connection="close") from None

    def _model(self, call: Call) -> Model:
        model = self.models.get(call.model or "")
        if model is None:
            served = ", ".join(self.models)
            raise HTTPError(404, f"there is no model of this name; served are: {served}.")
        if call.version not in (None, model.version):
            raise HTTPError(404, f"{model.name} is served in version {model.version} only.")
        call.record.model, call.record.version = model.name, model.version
        return model


async def _threaded(wanted: bool, function: Callable[..., T], *arguments: Any) -> T:
    """Call ``function``, in a thread where that is wanted: the event loop goes on meanwhile."""
    return await asyncio.to_thread(function, *arguments) if wanted else function(*arguments)


def _json(content: msgspec.Struct, status: int = 200) -> Response:
    return Response(status, msgspec.json.encode(content))


def _header_length(scope: Scope) -> int | None:
    sent = header(scope, b"inference-header-content-length")
    if sent is None:
        return None
    if not (sent.isdigit() and len(sent) < 19):
        raise HTTPError(400, "Inference-Header-Content-Length must be a number of bytes.")
    return int(sent)


def _signature(model: Model, texts: int) -> protocol.Signature:
    return protocol.Signature(
        model.vocabulary_size,
        model.max_length,
        any(tensor.name == "token_type_ids" for tensor in model.manifest.inputs),
        texts,
    )


def _facts(model: Model) -> ModelInfo:
    manifest = model.manifest
    source = (manifest.source.get("backbone"), manifest.source.get("kind"))
    return ModelInfo(
        name=model.name,
        version=model.version,
        ready=model.ready,
        labels=manifest.labels,
        problem_type=manifest.problem_type,
        precision=manifest.precision,
        max_length=manifest.max_length,
        pooling=manifest.pooling,
        source=" ".join(str(part) for part in source if part),
        notes=manifest.notes,
    )

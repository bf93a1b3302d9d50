"""Handlers of the HTTP application: inference, what the models are, readiness and metrics.

Each takes a :class:`~trainkit.serve.http.operations.Call` and returns a response or raises.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from starlette.responses import Response

from trainkit import __version__
from trainkit.serve.encoding import Text, Tokens, characters
from trainkit.serve.http import classify, metrics
from trainkit.serve.http import inference_protocol as protocol
from trainkit.serve.http.batching import BatchStats
from trainkit.serve.http.exceptions import DeadlineError, HTTPError
from trainkit.serve.http.messages import (
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
from trainkit.serve.http.middleware import (
    RequestLog,
    header,
    header_timeout_s,
    json_response,
    read_body,
    unless_gone,
)
from trainkit.serve.http.model import Model, Models
from trainkit.serve.http.operations import Call
from trainkit.serve.http.settings import Settings
from trainkit.serve.http.tensors import Signature
from trainkit.serve.postprocess import probabilities
from trainkit.serve.types import FloatArray

T = TypeVar("T")
LONG = 1 << 16  # bytes of a body: reading more takes longer than the hop to a thread
MANY = 64  # rows: likewise
AT_HAND_S = 0.1  # to read a body that came with the request, even with a shorter deadline
BINARY = "application/octet-stream"


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
        self._noted: WeakKeyDictionary[Model, dict[str, int]] = WeakKeyDictionary()
        self.server = ServerMetadata(
            "trainkit", __version__, ["binary_tensor_data", "schedule_policy"]
        )

    def observe(self, log: RequestLog) -> None:
        """Count a request that was answered."""
        metrics.of(metrics.REQUESTS, log.route, log.model, log.status).inc()
        if log.error:
            metrics.of(metrics.ERRORS, log.error).inc()
        if log.infer_s is not None:
            metrics.of(metrics.TOKENIZE, log.model).observe(log.tokenize_s or 0)
            metrics.of(metrics.QUEUE, log.model).observe(log.queue_s or 0)
            metrics.of(metrics.INFER, log.model).observe(log.infer_s)

    def observe_batch(self, model: Model, facts: BatchStats) -> None:
        """Count a batch that was run."""
        metrics.of(metrics.BATCH_ROWS, model.name).observe(facts.rows)
        metrics.of(metrics.BATCH_TOKENS, model.name).observe(facts.tokens)
        self._note(model)

    def _note(self, model: Model) -> None:
        """Set the gauges that changed; called after each batch."""
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
        return json_response(self.server)

    async def live(self, call: Call) -> Response:
        """Report that the process answers."""
        return json_response(Live(True))

    async def ready(self, call: Call) -> Response:
        """Report whether every model takes requests."""
        ready = not self.draining() and all(model.ready for model in self.models.values())
        return json_response(Ready(ready), 200 if ready else 503)

    async def model_ready(self, call: Call) -> Response:
        """Report whether one model takes requests."""
        model = self._model(call)
        ready = model.ready and not self.draining()
        return json_response(ModelReady(model.name, ready), 200 if ready else 503)

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
        return json_response(
            ModelMetadata(model.name, versions, "onnxruntime_onnx", inputs, outputs)
        )

    async def facts(self, call: Call) -> Response:
        """Describe every model, for people."""
        return json_response(ModelList([_facts(model) for model in self.models.values()]))

    async def metrics(self, call: Call) -> Response:
        """Give the metrics as Prometheus reads them."""
        for model in self.models.values():
            self._note(model)
        body = await asyncio.to_thread(metrics.exposition)
        return Response(body, media_type="text/plain; version=0.0.4; charset=utf-8")

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
        work = self._infer(call.log, model, request.texts, request.rows, timeout_s)
        rows, logits = await unless_gone(call.receive, work)
        classifier = model.classifier
        scores = probabilities(logits, classifier.problem_type, classifier.temperature)
        name = (model.name, model.version)
        answer, length = await _threaded(
            len(rows) > MANY, protocol.encode, request, name, classifier.labels, logits, scores
        )
        if length is None:
            return Response(answer, media_type="application/json")
        headers = {"Inference-Header-Content-Length": str(length)}
        return Response(answer, 200, headers, BINARY)

    async def classify(self, call: Call) -> Response:
        """Answer texts with labels."""
        timeout_s = header_timeout_s(call.scope)
        body = await self._body(call, timeout_s)
        request = await _threaded(len(body) > LONG, classify.decode, body)
        name = request.model or next(iter(self.models))
        model = self._model(call._replace(model=name))
        thresholds = classify.thresholds_of(request, model)
        work = self._infer(call.log, model, request.texts, None, timeout_s)
        rows, logits = await unless_gone(call.receive, work)
        found = await _threaded(
            len(rows) > MANY, classify.predictions, model, rows, logits, request.top_k, thresholds
        )
        log = call.log
        total_s = time.perf_counter() - log.started
        parts_s = (log.tokenize_s or 0, log.queue_s or 0, log.infer_s or 0, total_s)
        timings = Timings(*(round(part * 1000, 3) for part in parts_s))
        return json_response(ClassifyResponse(model.name, model.version, found, timings))

    async def _infer(
        self,
        log: RequestLog,
        model: Model,
        texts: Sequence[Text] | None,
        rows: Sequence[Tokens] | None,
        timeout_s: float,
    ) -> tuple[Sequence[Tokens], FloatArray]:
        """Return the encoded rows and their logits; the limits are checked before each step."""
        deadline = log.started + min(timeout_s, self.settings.timeout_s)
        begin = time.perf_counter()
        if texts is not None:
            log.texts = len(texts)
            self._check_texts(texts)
            with self.tracing.span("tokenize"):
                rows = await model.tokens(texts)
        assert rows is not None
        log.texts, log.tokens = len(rows), sum(len(row.ids) for row in rows)
        if log.tokens > self.settings.limits.tokens:
            raise HTTPError(
                422,
                f"the texts have {log.tokens} tokens together, and a request may have "
                f"{self.settings.limits.tokens}; send fewer at a time.",
            )
        now = time.perf_counter()
        log.tokenize_s = now - begin
        if now >= deadline:
            raise DeadlineError
        answer = await model.infer(rows, deadline - now)
        log.queue_s, log.infer_s = answer.queue_s, answer.infer_s
        self.tracing.spans_until_now(queue=answer.queue_s, infer=answer.infer_s)
        return rows, answer.logits

    def _check_texts(self, texts: Sequence[Text]) -> None:
        limits = self.settings.limits
        if not 0 < len(texts) <= limits.texts:
            raise HTTPError(422, f"a request has from 1 to {limits.texts} texts, not {len(texts)}.")
        count = sum(map(characters, texts))
        if count > limits.characters:
            raise HTTPError(
                413,
                f"the texts have {count} characters together, and a request may have "
                f"{limits.characters}; send fewer at a time.",
            )

    async def _body(self, call: Call, timeout_s: float) -> bytes:
        """Read the body, before the request's deadline."""
        deadline = call.log.started + min(timeout_s, self.settings.timeout_s)
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
        call.log.model, call.log.version = model.name, model.version
        return model


async def _threaded(wanted: bool, function: Callable[..., T], *arguments: Any) -> T:
    """Call ``function``, in a thread if ``wanted``."""
    return await asyncio.to_thread(function, *arguments) if wanted else function(*arguments)


def _header_length(scope: Any) -> int | None:
    sent = header(scope, b"inference-header-content-length")
    if sent is None:
        return None
    if not (sent.isdigit() and len(sent) < 19):
        raise HTTPError(400, "Inference-Header-Content-Length must be a number of bytes.")
    return int(sent)


def _signature(model: Model, texts: int) -> Signature:
    return Signature(
        model.vocabulary_size, model.max_length, model.classifier.encoder.token_types, texts
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

"""Prometheus metrics, and optional OpenTelemetry spans.

Labels are bounded: routes are templates, models are those that are served. With
PROMETHEUS_MULTIPROC_DIR set before this module is imported, several workers add up, and any of
them answers for all. Time histograms are in seconds.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from trainkit.serve.http.traces import not_installed

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

Metric = TypeVar("Metric", Counter, Gauge, Histogram)

REGISTRY = CollectorRegistry()
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5)  # and +Inf: ten
SIZES = (16, 64, 256, 512, 1024, 2048, 4096, 16384)


def _histogram(name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(name, documentation, ("model",), buckets=buckets, registry=REGISTRY)


def _gauge(name: str, documentation: str, labels: tuple[str, ...] = ("model",)) -> Gauge:
    return Gauge(name, documentation, labels, registry=REGISTRY, multiprocess_mode="livesum")


REQUESTS = Counter(
    "trainkit_requests", "Requests answered.", ("route", "model", "status"), registry=REGISTRY
)
ERRORS = Counter("trainkit_errors", "Requests refused or failed.", ("kind",), registry=REGISTRY)
TOKENIZE = _histogram("trainkit_tokenize_seconds", "Tokenizing.", SECONDS)
QUEUE = _histogram("trainkit_queue_seconds", "In the queue.", SECONDS)
INFER = _histogram(
    "trainkit_infer_seconds", "From the first batch of a request to the end of its last.", SECONDS
)
BATCH_TOKENS = _histogram("trainkit_batch_tokens", "Tokens of a batch.", SIZES)
BATCH_ROWS = _histogram("trainkit_batch_rows", "Texts of a batch.", (1, 2, 4, 8, 16, 32, 64, 128))
QUEUE_ROWS = _gauge("trainkit_queue_rows", "Texts in the queue.")
QUEUE_TOKENS = _gauge("trainkit_queue_tokens", "Tokens in the queue.")
# A gauge, since the model process gives the total; of several workers, the sum of those alive.
RESTARTS = _gauge("trainkit_worker_restarts", "Restarts of model processes.")
INFO = _gauge("trainkit_model_info", "HTTP workers that serve this version.", ("model", "version"))
_versions: dict[str, str] = {}


@cache
def of(metric: Metric, *labels: object) -> Metric:
    """Return the metric of these labels, as ``metric.labels`` does; it is asked at each request."""
    return metric.labels(*labels)


def set_version(model: str, version: str) -> None:
    """Note which version of a model is served; the one before it is not any more."""
    if _versions.get(model) == version:
        return
    if model in _versions:
        INFO.labels(model, _versions[model]).set(0)
    INFO.labels(model, version).set(1)
    _versions[model] = version


def exposition() -> bytes:
    """Return all metrics in Prometheus' text format, version 0.0.4."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return generate_latest(REGISTRY)
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)


class Tracing:
    """Spans of OpenTelemetry if enabled; ``InputError`` if that is not installed."""

    def __init__(self, enabled: bool) -> None:
        self.tracer: Any = None
        if enabled:
            try:
                from opentelemetry import trace
                from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
            except ImportError as error:
                raise not_installed(error) from None
            self.tracer = trace.get_tracer("trainkit.serve")
            self._middleware = OpenTelemetryMiddleware

    def around(self, app: "ASGIApp") -> "ASGIApp":
        """Wrap ``app`` in the ASGI middleware if tracing is enabled."""
        if self.tracer is None:
            return app
        traced: ASGIApp = self._middleware(app)

        async def without_query(scope: "Scope", receive: "Receive", send: "Send") -> None:
            # No route has one, and a span would keep any text that a client put there.
            await traced({**scope, "query_string": b""}, receive, send)

        return without_query

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Trace a block."""
        if self.tracer is None:
            yield
        else:
            with self.tracer.start_as_current_span(
                name, record_exception=False, set_status_on_exception=False
            ):
                yield

    def spans_until_now(self, **seconds: float) -> None:
        """Write the spans of steps that came one after another and end now, by their names."""
        if self.tracer is None:
            return
        start_ns = time.time_ns() - int(sum(seconds.values()) * 1e9)
        for name, duration_s in seconds.items():
            span = self.tracer.start_span(name, start_time=start_ns)
            start_ns += int(duration_s * 1e9)
            span.end(end_time=start_ns)

"""Where spans go: to the OpenTelemetry collector that the usual OTEL_* variables name.

OTLP over HTTP, its default http://localhost:4318. A process that was started with a tracer provider
of its own, as under ``opentelemetry-instrument``, keeps it.
"""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from trainkit.serve.errors import InputError

FLUSH_S = 3.0  # at the end, for a collector that does not answer; less than a front has to exit
# The supported value of each variable; others would be ignored silently.
UNDERSTOOD = {
    "OTEL_TRACES_EXPORTER": "otlp",
    "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
}

log = logging.getLogger("trainkit.serve")


def not_installed(error: ImportError) -> InputError:
    """Say which package is missing, and how to get it."""
    return InputError(
        f"OpenTelemetry needs {error.name}, which is not installed; "
        "run: pip install 'trainkit-onnx[otel]'"
    )


@contextmanager
def exported(enabled: bool) -> Iterator[None]:
    """Send this process's spans while the block runs, and the last ones at its end.

    Raises ``InputError`` if it is not installed or a variable asks for something else.
    """
    if not enabled:
        yield
        return
    for name, understood in UNDERSTOOD.items():
        if os.environ.get(name, understood) != understood:
            raise InputError(
                f"{name} is {os.environ[name]!r}, and --otel sends {understood} only; unset it, or "
                "start trainkit under opentelemetry-instrument."
            )
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise not_installed(error) from None
    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        yield
        return
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "trainkit"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        # By itself it may try for half a minute, and a server's end is bounded.
        ending = threading.Thread(target=provider.shutdown, daemon=True)
        ending.start()
        ending.join(FLUSH_S)
        if ending.is_alive():
            log.warning("the last spans could not be sent in %.0f s and are lost", FLUSH_S)

"""``trainkit serve --otel`` and a collector: what arrives there, and what must not."""

import contextlib
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra [otel] is missing")

from google.protobuf.json_format import MessageToJson
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

GOLDEN = Path(__file__).parents[1] / "golden" / "bundle"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"  # the W3C's own example
TEXT = "How far is Zanzibar?"
WAIT_S = 60.0


class Collector(http.server.ThreadingHTTPServer):
    """Takes OTLP over HTTP; ``status`` is its answer, or None where it gives none."""

    def __init__(self, status=200):
        super().__init__(("127.0.0.1", 0), Receiver)
        self.status = status
        self.received = []
        self.asked, self.leave = threading.Event(), threading.Event()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.path, self.headers["Content-Type"], body))
        self.server.asked.set()
        if self.server.status is None:
            self.server.leave.wait(WAIT_S)
            return
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def collecting(status=200):
    with Collector(status) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            collector.leave.set()
            collector.shutdown()
            thread.join()


def served(collector, *options):
    """Run the command, ask it once, end it; returns its exit code and standard error."""
    command = [sys.executable, "-m", "trainkit", "serve", str(GOLDEN), "--port=0", *options]
    environment = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.address}
    with subprocess.Popen(
        [*command, "--threads=1", "--drain-seconds=0"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            address = process.stdout.readline().split()[1]
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            url, body = f"{address}/classify", {"texts": [TEXT]}
            answer = httpx.post(url, json=body, headers=headers, params={"q": TEXT}, timeout=WAIT_S)
            assert answer.status_code == 200
            process.terminate()
            errors = process.communicate(timeout=WAIT_S)[1]
        finally:
            process.kill()
    return process.returncode, errors


@pytest.mark.parametrize("workers", [1, 2])
def test_spans_arrive_in_the_callers_trace_and_hold_no_text(workers):
    with collecting() as collector:
        code, errors = served(collector, "--otel", "--workers", str(workers))
    assert code == 0
    assert "opentelemetry" not in errors
    assert {(path, kind) for path, kind, _ in collector.received} == {
        ("/v1/traces", "application/x-protobuf")
    }
    messages = [ExportTraceServiceRequest.FromString(body) for _, _, body in collector.received]
    resources = [one for message in messages for one in message.resource_spans]
    names = {
        attribute.value.string_value
        for one in resources
        for attribute in one.resource.attributes
        if attribute.key == "service.name"
    }
    assert names == {"trainkit"}
    spans = [span for one in resources for scope in one.scope_spans for span in scope.spans]
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    (request,) = [span for span in spans if span.parent_span_id.hex() == PARENT]
    children = {span.name for span in spans if span.parent_span_id == request.span_id}
    assert {"tokenize", "queue", "infer"} <= children
    assert all(
        request.start_time_unix_nano <= span.end_time_unix_nano <= request.end_time_unix_nano
        for span in spans
        if span.name in ("tokenize", "queue", "infer")
    )
    for sent in [*map(MessageToJson, messages), *(repr(body) for _, _, body in collector.received)]:
        assert "Zanzibar" not in sent
    assert "Zanzibar" not in errors


def test_without_the_option_nothing_is_sent():
    with collecting() as collector:
        assert served(collector)[0] == 0
    assert collector.received == []


def test_a_collector_that_does_not_answer_does_not_keep_the_server():
    with collecting(status=None) as collector:
        code, errors = served(collector, "--otel")
        assert collector.asked.is_set()
    assert code == 0
    assert "the last spans could not be sent in 3 s and are lost" in errors


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_TRACES_EXPORTER", "console"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
    ],
)
def test_a_variable_that_would_be_ignored_is_refused(name, value, refused, monkeypatch):
    monkeypatch.setenv(name, value)
    refused("serve", GOLDEN, "--port=0", "--otel", told=[f"{name} is {value!r}", "unset it"])

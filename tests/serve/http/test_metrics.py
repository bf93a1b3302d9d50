"""Metrics: Prometheus' own parser reads them, they count what happened, and labels stay few."""

import builtins
import os
import subprocess
import sys

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from trainkit.serve.errors import InputError
from trainkit.serve.http import metrics


def samples(text):
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(address):
    return samples(httpx.get(f"{address}/metrics").text)


def requests(found, route, status):
    labels = (("model", "golden"), ("route", route), ("status", str(status)))
    return found.get(("trainkit_requests_total", *labels), 0)


def test_what_happened_is_counted(address):
    before = scrape(address)
    for texts in (["How far is Mars?", "Who wrote the Odyssey?"], ["Why?"], [""]):
        httpx.post(f"{address}/classify", json={"texts": texts})
    after = scrape(address)
    assert requests(after, "/classify", 200) == requests(before, "/classify", 200) + 2
    assert requests(after, "/classify", 422) == requests(before, "/classify", 422) + 1

    def more(name, *labels):
        return after[(name, *labels)] - before.get((name, *labels), 0)

    assert more("trainkit_errors_total", ("kind", "input")) == 1
    model = ("model", "golden")
    for step in ("tokenize", "queue", "infer"):
        assert more(f"trainkit_{step}_seconds_count", model) == 2
    assert more("trainkit_infer_seconds_sum", model) > 0
    assert more("trainkit_batch_rows_sum", model) == 3
    assert more("trainkit_batch_tokens_sum", model) > 3
    assert after[("trainkit_queue_rows", model)] == 0
    assert after[("trainkit_queue_tokens", model)] == 0
    assert after[("trainkit_worker_restarts", model)] == 0
    version = httpx.get(f"{address}/v2/models/golden").json()["versions"][0]
    assert after[("trainkit_model_info", model, ("version", version))] == 1


def test_unknown_paths_and_models_make_no_labels(address):
    httpx.get(f"{address}/nothing")
    scrape(address)  # which counts itself, from the second time on
    before = scrape(address)
    for number in range(20):
        httpx.get(f"{address}/{number}")
        httpx.post(f"{address}/v2/models/{number}/infer", json={})
        httpx.post(f"{address}/classify", json={"texts": ["a"], "model": str(number)})
        httpx.request(f"M{number}", f"{address}/v2")
    added = scrape(address).keys() - before.keys()
    assert len({key for key in added if not key[0].endswith("_created")}) <= 3


def test_a_histogram_has_ten_buckets_at_most(address):
    buckets = [key for key in scrape(address) if key[0] == "trainkit_infer_seconds_bucket"]
    assert 5 <= len(buckets) <= 10


def test_a_version_that_was_replaced_is_no_longer_served():
    metrics.set_version("swapped", "one")
    metrics.set_version("swapped", "two")
    found = samples(metrics.exposition().decode())
    key = "trainkit_model_info"
    assert found[(key, ("model", "swapped"), ("version", "one"))] == 0
    assert found[(key, ("model", "swapped"), ("version", "two"))] == 1


def test_several_processes_add_up(tmp_path):
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    code = (
        "from trainkit.serve.http import metrics\n"
        "metrics.REQUESTS.labels('/classify', 'golden', 200).inc()\n"
        "metrics.QUEUE_ROWS.labels('golden').set(2)\n"
        "print(metrics.exposition().decode())\n"
    )
    for _ in range(2):
        run = [sys.executable, "-c", code]
        result = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert requests(samples(result.stdout), "/classify", 200) == 2


@pytest.fixture
def spans(monkeypatch):
    """Collect the spans of this test."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield exporter
    provider.shutdown()


def test_a_request_is_traced_without_its_text(serve, spans):
    with serve(otel=True) as (address, _):
        body = {"texts": ["How far is Zanzibar?"]}
        httpx.post(f"{address}/classify", json=body, params={"q": "Zanzibar"})
    found = spans.get_finished_spans()
    assert {"tokenize", "queue", "infer"} < {span.name for span in found}
    assert len({span.context.trace_id for span in found}) == 1
    assert "Zanzibar" not in "".join(span.to_json() for span in found)


def test_a_missing_package_is_named(monkeypatch):
    genuine = builtins.__import__

    def without(name, *rest):
        if name.startswith("opentelemetry.instrumentation"):
            raise ModuleNotFoundError(name=name)
        return genuine(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'trainkit-onnx\[otel\]'"):
        metrics.Tracing(True)
    metrics.Tracing(False)

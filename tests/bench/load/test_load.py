"""The load generator against a server of known behaviour, in a process of its own."""

import asyncio
import http.client
import io
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from rich.console import Console

from tests.helpers.retry_timing import retry_timing
from trainkit.bench.load import generator
from trainkit.bench.load import result as results
from trainkit.bench.load.generator import Target, generate, schedule
from trainkit.bench.load.protocols import PROTOCOLS, guess_protocol, public_url
from trainkit.bench.load.result import LoadRun, Sample
from trainkit.bench.load.search import MAX_PROBES, find_rate, hopeless
from trainkit.bench.load.settings import LoadSettings
from trainkit.bench.load.tables import table
from trainkit.bench.measure.arrivals import arrivals
from trainkit.cli import cli
from trainkit.serve.errors import InputError

TEXTS = ["How far is it from Denver to Aspen ?", "Who was Galileo ?", "What is an atom ?"]
SERVER = Path(__file__).parents[1] / "slow_server.py"


@contextmanager
def server(path: str = "/classify", **behaviour: Any) -> Iterator[Target]:
    command = [sys.executable, "-P", str(SERVER), json.dumps(behaviour)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin
    assert process.stdout
    try:
        yield Target(f"http://127.0.0.1:{process.stdout.readline().strip()}{path}", TEXTS)
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(10)


def seen(target: Target) -> dict[str, Any]:
    """Ask the server what came in."""
    connection = http.client.HTTPConnection(urlsplit(target.url).netloc.rpartition("@")[2])
    connection.request("GET", "/seen")
    document: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    return document


def nobody() -> Target:
    """Return an address where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return Target(f"http://127.0.0.1:{free.getsockname()[1]}/classify", TEXTS)


def settings(**changed: Any) -> LoadSettings:
    quick = {"warm_up_s": 0.0, "duration_s": 1.0, "timeout_s": 5.0}
    return LoadSettings(**quick | changed)


def measure(target: Target, **changed: Any) -> LoadRun:
    how = settings(**changed)
    return generate(target, how, schedule(how))


def one_worker(due: NDArray[np.float64], service_s: float) -> NDArray[np.float64]:
    """Return the latency of each request at one worker: Lindley's recursion (1952)."""
    waits = np.zeros(len(due))
    for number, gap in enumerate(np.diff(due)):
        waits[number + 1] = max(0.0, waits[number] + service_s - gap)
    return waits + service_s


@retry_timing
def test_at_a_low_rate_latency_is_the_service_time() -> None:
    with server(service_s=0.02) as target:
        run = measure(target, rate=20, arrivals="constant", duration_s=1.5)
    assert (run.requests, run.answered, run.errors, run.queued) == (30, 30, {}, 0)
    assert run.p50_ms is not None
    assert 20 <= run.p50_ms < 25
    assert run.p99_ms is None  # 30 requests do not carry it
    assert run.rate_offered == pytest.approx(20)
    assert 18 < run.rate_answered <= 20
    assert 0 < run.cpu_share < 0.5


@retry_timing
def test_every_latency_is_that_of_the_queue_which_the_arrivals_make() -> None:
    how = settings(rate=70, duration_s=3)
    due = schedule(how)
    with server(service_s=0.01) as target:
        run = generate(target, how, due)
    expected = one_worker(due, 0.01)
    assert expected.max() > 0.03  # there are queues
    measured = np.array([sample.latency_s for sample in run.samples])
    assert np.median(np.abs(measured - expected)) < 0.004
    assert np.mean(measured) == pytest.approx(np.mean(expected), abs=0.008)


@retry_timing
def test_a_stall_of_a_second_is_charged_for_every_request_that_was_due_in_it() -> None:
    with server(stall_at=100) as target:
        run = measure(target, rate=100, arrivals="constant", duration_s=4.7)
    late = [sample.latency_s for sample in run.samples if sample.latency_s > 0.1]
    assert 85 <= len(late) <= 100
    assert np.quantile(late, 0.5) == pytest.approx(0.55, abs=0.08)  # from 0.1 to 1.0, evenly
    assert 0.95 < max(late) < 1.2
    assert run.p99_ms is not None
    assert run.p99_ms > 900
    assert run.p50_ms is not None
    assert run.p50_ms < 10


@pytest.mark.timing
def test_a_closed_loop_would_have_seen_one_late_request() -> None:
    with server(stall_at=100) as target:
        connection = http.client.HTTPConnection(urlsplit(target.url).netloc)
        latencies = []
        for _ in range(470):
            started = time.perf_counter()
            connection.request("POST", "/classify", json.dumps({"texts": TEXTS[:1]}))
            connection.getresponse().read()
            latencies.append(time.perf_counter() - started)
        connection.close()
    assert sum(latency > 0.1 for latency in latencies) == 1
    assert np.percentile(latencies, 99) < 0.1


@pytest.mark.timing
def test_a_wait_for_a_connection_counts_from_the_due_time_too() -> None:
    with server(stall_at=50) as target:
        run = measure(target, rate=100, arrivals="constant", duration_s=2, connections=1)
        assert seen(target)["most_open"] <= 2  # and the one that asks
    assert sum(sample.latency_s > 0.1 for sample in run.samples) >= 85
    assert run.queued >= 85
    queued = [sample for sample in run.samples if sample.queued]
    assert max(sample.send_delay_s for sample in queued) > 0.9
    assert run.start_delay_p99_ms is not None
    assert run.start_delay_p99_ms < 100  # the server was late, not the generator


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("500", "HTTP 500"),
        ("503", "HTTP 503"),
        ("404", "HTTP 404"),
        ("reset", "connection reset"),
        ("half", "connection reset"),
        ("hang", "timeout"),
        ("not json", "invalid answer"),
        ("too few", "invalid answer"),
        ("not http", "invalid answer"),
    ],
)
def test_errors_are_counted_by_kind(fault: str, kind: str) -> None:
    with server(every=10, fault=fault) as target:
        run = measure(target, rate=200, arrivals="constant", duration_s=0.5, timeout_s=0.5)
        assert seen(target)["requests"] == 100  # nothing is sent twice
    assert (run.requests, run.answered, run.errors) == (100, 90, {kind: 10})
    assert [sample.outcome for sample in run.samples].count(kind) == 10


@pytest.mark.timing
def test_a_server_that_hangs_ends_the_run_in_time_and_shows_in_the_percentiles() -> None:
    started = time.monotonic()
    with server(every=1, fault="hang") as target:
        run = measure(target, rate=100, duration_s=0.5, timeout_s=0.4, arrivals="constant")
    assert time.monotonic() - started < 3
    assert run.errors == {"timeout": 50}
    assert run.p50_ms is not None
    assert 400 <= run.p50_ms < 450


def test_a_server_that_is_not_there_is_refused_before_the_start() -> None:
    with pytest.raises(InputError, match=r"nothing listens at http.*connection refused"):
        generator.run(nobody(), settings())
    assert measure(nobody(), rate=50, arrivals="constant").errors == {"connection refused": 50}


def test_a_first_request_that_will_never_be_accepted_is_explained() -> None:
    with (
        server(every=1, fault="401") as target,
        pytest.raises(InputError, match=r"HTTP 401.*--header"),
    ):
        generator.run(target, settings())
    with server(every=1, fault="429") as target:  # full, which is what one may want to measure
        result = generator.run(target, settings(duration_s=0.1))
    assert set(result.runs[0].errors) == {"HTTP 429"}


def test_v2_requests_hold_several_texts_in_arrival_order() -> None:
    with server("/v2/models/m/infer") as target:
        assert guess_protocol(target.url) == "v2"
        run = measure(target, protocol="v2", texts_per_request=4, rate=100, duration_s=0.3)
        assert set(seen(target)["sizes"]) == {4}
    assert run.answered == run.requests > 10
    assert guess_protocol("http://h/classify?then=/infer") == "classify"


@pytest.mark.parametrize(
    ("protocol", "content", "answers"),
    [
        ("classify", b'{"predictions": [{"label": "A"}]}', 1),
        ("classify", b'[{"label": "A"}, {"label": "B"}]', 2),
        ("classify", b'{"error": "no"}', None),
        ("classify", b"\xff", None),
        ("v2", b'{"outputs": []}', None),
        ("v2", b'{"outputs": [{"name": "a", "shape": [2], "datatype": "BYTES", "data": []}]}', 2),
        ("v2", b'{"error": "no"}', None),
    ],
)
def test_answers_are_checked(protocol: str, content: bytes, answers: int | None) -> None:
    assert PROTOCOLS[protocol].answers(content) == answers


@pytest.mark.timing
def test_the_warm_up_is_not_counted_and_the_count_is_bounded() -> None:
    how = settings(rate=100, arrivals="constant", warm_up_s=0.5, duration_s=60, max_requests=40)
    assert len(schedule(how)) == 90
    assert len(schedule(msgspec.structs.replace(how, duration_s=0.2))) == 70
    assert len(schedule(msgspec.structs.replace(how, max_requests=700, duration_s=0.2), 459)) == 509
    with server(stall_at=1, stall_s=0.3) as target:
        run = generate(target, how, schedule(how))
        assert seen(target)["requests"] == 90
    assert (run.warm_up_requests, run.requests) == (50, 40)
    assert run.max_ms is not None
    assert run.max_ms < 200  # the first request's 300 ms were warm-up


@pytest.mark.timing
def test_a_generator_that_is_late_itself_says_so() -> None:
    how = settings(rate=100, arrivals="constant", duration_s=0.6)
    with server() as target:
        quiet = generate(target, how, schedule(how))
        late = generate(target, how, schedule(how), lambda sample: bool(time.sleep(0.012)))
    assert late.start_delay_p99_ms is not None
    assert quiet.start_delay_p99_ms is not None
    assert late.start_delay_p99_ms > max(10, quiet.start_delay_p99_ms)
    assert "the generator itself sent late" in late.noisy_because[0]


@pytest.mark.timing
def test_timers_are_finer_than_a_millisecond() -> None:
    async def typical() -> float:
        async def once() -> float:
            started = time.perf_counter()
            await asyncio.sleep(0.0002)
            return time.perf_counter() - started

        return float(np.quantile([await once() for _ in range(200)], 0.2))

    assert 0.0002 <= generator._in_loop(typical()) < 0.0009


@retry_timing
def test_the_highest_rate_of_one_worker_is_found() -> None:
    service_s, limit_ms = 0.0025, 50
    how = settings(rate=200, p99_below_ms=limit_ms, duration_s=1, max_seconds=40, warm_up_s=0.2)
    with server(service_s=service_s) as target:
        result = generator.run(target, how)
    search = result.search
    assert search is not None
    assert search.rate is not None
    trail = [(run.rate, bool(run.failed_because)) for run in result.runs]
    best = max(rate for rate, failed in trail if not failed)
    # The same arrivals at an ideal worker: the queue alone decides, whatever this machine does.
    ideal = max(
        rate
        for rate in np.arange(100, 500, 4.0)
        if np.percentile(one_worker(arrivals("poisson", rate, 500), service_s), 99)
        < limit_ms / 1000
    )
    assert 0.7 * ideal < best < 1.1 * ideal, (trail, search.summary)
    assert search.rate < 1.02 / service_s
    assert all(run.requests >= 459 for run in result.runs if not run.failed_because)


def answers_in(
    rate: float, latency_s: float, count: int = 500, late_s: float = 0.0, cpu_share: float = 0.1
) -> LoadRun:
    samples = [
        Sample(due_s, late_s, late_s, latency_s, False, "ok")
        for due_s in arrivals("constant", rate, count).tolist()
    ]
    return results.summarise(
        samples,
        rate=rate,
        warm_up_requests=0,
        unfinished=0,
        cpu_share=cpu_share,
        interrupted=False,
    )


def search(capacity: float, **changed: Any) -> tuple[list[LoadRun], results.RateSearch]:
    late_s = changed.pop("late_s", 0.0)

    def probe(rate: float) -> LoadRun:
        over = rate > capacity
        return answers_in(rate, 0.2 if over else 0.01, late_s=late_s if over else 0.0)

    how = {"start": 10.0, "p99_below_ms": 50, "max_seconds": 1e9, "seconds_of": lambda rate: 1.0}
    return find_rate(probe, **how | changed)


@pytest.mark.parametrize("capacity", [1.3, 9.0, 10.0, 37.0, 1234.0, 8000.0])
def test_the_search_comes_within_five_percent(capacity: float) -> None:
    runs, found = search(capacity)
    assert found.rate is not None
    assert capacity / 1.06 <= found.rate <= capacity * 1.001
    assert found.limited_by == "server"
    assert len(runs) <= 18
    assert "500 of 500 took 50 ms or more" in found.summary


def test_the_search_says_what_kept_it_from_more() -> None:
    runs, found = search(0.9)
    assert ([run.rate for run in runs], found.rate) == ([10.0, 5.0, 2.5, 1.25], None)
    assert "not even 1.2 requests/s" in found.summary
    _, found = search(100.0, late_s=0.02)
    assert found.limited_by == "generator"
    assert "that was the limit" in found.summary
    runs, found = search(100.0, max_seconds=0.5)
    assert (runs, found.rate, found.limited_by) == ([], None, "time")
    runs, found = search(float("inf"))
    assert (len(runs), found.limited_by) == (MAX_PROBES, "probes")


def test_a_noisy_failure_is_probed_once_more() -> None:
    runs, _ = search(15.0, late_s=0.02)
    assert [run.rate for run in runs[:4]] == [10, 20, 20, pytest.approx(200**0.5)]


def test_a_hopeless_probe_ends_early_and_not_before() -> None:
    watch = hopeless(50, 500)
    late = [Sample(0, 0, 0, 0.06, False, "ok")] * 7
    assert [watch(sample) for sample in late] == [False] * 5 + [True] * 2
    for count in (5, 6):  # what it promises: with one more, the p99 is above the limit
        assert (np.percentile([0.06] * count + [0.0] * (500 - count), 99) > 0.05) == (count == 6)
    assert hopeless(50, 500)(Sample(0, 0, 0, 0.01, False, "HTTP 500"))


def test_percentiles_are_given_where_the_sample_carries_them() -> None:
    few, many = answers_in(100, 0.01, 4602), answers_in(100, 0.01, 4603)
    assert (few.p99_ms, few.p999_ms) == (pytest.approx(10), None)
    assert many.p999_ms == pytest.approx(10)
    assert (answers_in(9, 0.01, 89).p95_ms, answers_in(9, 0.01, 90).p95_ms) == (
        None,
        pytest.approx(10),
    )
    assert answers_in(9, 0.01, 0).max_ms is None


def test_a_busy_generator_is_noise() -> None:
    assert answers_in(100, 0.01).noisy_because == ()
    assert "95% of its one core" in answers_in(100, 0.01, cpu_share=0.95).noisy_because[0]
    assert "p99 of the delay 6.0 ms" in answers_in(100, 0.01, late_s=0.006).noisy_because[0]


def test_the_table_says_what_went_wrong() -> None:
    with server(every=10, fault="503") as target:
        how = settings(rate=100, arrivals="constant", duration_s=0.5, connections=1)
        result = generator.run(target, how)
    console = Console(file=io.StringIO(), width=160)
    console.print(table(msgspec.structs.replace(result, noisy=True, noisy_because=("a reason",))))
    assert isinstance(console.file, io.StringIO)
    printed = " ".join(console.file.getvalue().split())
    for piece in (
        "At 100/s: 5 x HTTP 503.",
        "Noisy: a reason.",
        "1 of 3 texts per request",
        "100.0",
    ):
        assert piece in printed


def test_settings_that_do_not_work_are_told_all_at_once() -> None:
    with pytest.raises(InputError, match=r"rate must be above 0.*connections must be at least 1"):
        LoadSettings(rate=0, connections=0)
    with pytest.raises(InputError, match="max_requests of 459"):
        LoadSettings(p99_below_ms=50, max_requests=100)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://h/x", "http://", "http://h:99999/", "http://["]
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="not the URL of a server"):
        public_url(url)


def command(*arguments: str) -> list[str]:
    return ["--data", "sample", "--warm-up", "0", "--duration", "0.5", *arguments]


def test_the_result_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server() as target:
        url = target.url.replace("//", "//me:geheim1@") + "?key=geheim2"
        out = str(tmp_path / "load.json")
        arguments = command(url, "--header", "X-Token: geheim3", "--header=Y:geheim4", "--out", out)
        monkeypatch.setattr(sys, "argv", ["trainkit", "bench", "load", *arguments])
        done = CliRunner().invoke(cli, ["bench", "load", *arguments], catch_exceptions=False)
        assert seen(target)["headers"]["x-token"] == "geheim3"
        assert seen(target)["headers"]["authorization"].startswith("Basic ")
    assert done.exit_code == 0
    for text in (done.output, Path(out).read_text()):
        assert "geheim" not in text
    result = results.load(Path(out))
    assert result.command[:6] == ("trainkit", "bench", "load", "--data", "sample", "--warm-up")
    assert "X-Token:***" in result.command
    assert (result.url, result.texts > 10) == (target.url, True)
    assert result.runs[0].answered == len(result.runs[0].samples) > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--find-rate"], "belong together"),
        (["--header", "geheim"], "has no NAME"),
        (["--header", "a b:geheim"], "number 1 is not an HTTP header"),
        (["--header", "a:ge\nheim"], "number 1 is not an HTTP header"),
        (["--out", "/dev/null/x.json"], "cannot be written"),
    ],
)
def test_wrong_options_are_input_errors(arguments: list[str], message: str) -> None:
    with server() as target:
        done = CliRunner().invoke(cli, ["bench", "load", *command(target.url, *arguments)])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert "geheim" not in done.output


def test_an_interrupt_ends_it_with_what_was_measured() -> None:
    # In a shell's background job, Ctrl-C is ignored by all that the tests start.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += "from trainkit.commands.bench_load import load; load()"
    with server() as target:
        arguments = [target.url, "--duration", "60", "--rate", "100", "--warm-up", "0", "--json"]
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", program, *arguments], stdout=subprocess.PIPE
        )
        while seen(target)["requests"] < 50:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=10)
    assert process.returncode == 130
    result = msgspec.json.decode(printed, type=results.LoadResult)
    assert result.interrupted
    assert 45 <= result.runs[0].answered < 1000

"""The servers' figures: against a server of known behaviour, and once the whole command."""

import sys
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import psutil
import pytest
from click.testing import CliRunner

from trainkit.bench.measure.environment import describe
from trainkit.bench.measure.statistics import Interval
from trainkit.bench.studies.serving import measure, study
from trainkit.bench.studies.serving.process import MemorySeries, cpu_share, memory_watched, started
from trainkit.bench.studies.serving.result import (
    AddedTime,
    Rate,
    SentTexts,
    ServerInfo,
    ServingFigures,
    ServingGoals,
    ServingPlan,
    Soak,
    check,
    growth,
    markdown,
    ratios,
)
from trainkit.serve.errors import CheckFailedError, InputError

ROOT = Path(__file__).parents[3]
BUNDLE = ROOT / "tests" / "golden" / "bundle"
TEXTS = ["How far is it from Denver to Aspen ?", "Who was Galileo ?", "What is an atom ?"]

# Unlike slow_server.py it prints a whole address, ends with SIGTERM, and can leak.
PROGRAM = """
import http.server, json, sys, time
hold = []
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    def do_POST(self):
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["texts"]
        time.sleep(float(sys.argv[1]))
        hold.append(bytearray(int(sys.argv[2])))
        body = json.dumps({"predictions": [{"label": "NUM"} for _ in texts]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(f"listening at http://127.0.0.1:{server.server_address[1]}", flush=True)
server.serve_forever()
"""


def launch(service_s: float = 0.0, kept_bytes: int = 0) -> measure.ServerLaunch:
    """Return a server that takes so long for a request, and keeps so much memory of each."""
    server = ServerInfo(name="known", about="", versions={})
    program = (sys.executable, "-P", "-c", PROGRAM, str(service_s), str(kept_bytes))
    return measure.ServerLaunch(server, program, BUNDLE)


def plan(**changed: object) -> ServingPlan:
    texts = SentTexts(
        name="t", count=3, median_characters=17, sha256="", p99_below_ms=50.0, rate=200
    )
    quick = ServingPlan(
        servers=(),
        texts=(texts,),
        bundles={},
        threads=1,
        rounds=1,
        duration_s=0.2,
        warm_up_s=0.1,
        max_search_s=3.4,  # time for one probe: 459 requests at 200/s
        added_blocks=2,
        soak_s=3.0,
        soak_share=0.7,
        idle_s=0.5,
    )
    return msgspec.structs.replace(quick, **changed)


def told(step: str) -> None:
    pass


def test_http_adds_the_time_that_the_server_takes() -> None:
    found = measure.added_time(launch(0.02), TEXTS, plan(), told)
    assert found.http_p50_ms > 20
    assert found.added_p50_ms == pytest.approx(found.http_p50_ms - found.library_p50_ms)
    assert 15 < found.added_p50_ms < 60


def test_a_soak_sees_no_growth_where_there_is_none_and_a_leak_where_there_is_one() -> None:
    flat = measure.soak(launch(), TEXTS, plan(), told)
    assert flat.answered == flat.requests
    assert 150 < flat.highest_per_s < 250  # the one probe that there was time for
    assert flat.rate == 0.7 * flat.highest_per_s
    assert [series.role for series in flat.memory] == ["front"]
    assert abs(flat.growth["front"]) < 0.05
    leaking = measure.soak(launch(kept_bytes=100_000), TEXTS, plan(), told)
    assert leaking.growth["front"] > 0.05


def test_growth_leaves_the_warm_up_out() -> None:
    def series(*values: int) -> MemorySeries:
        return MemorySeries(
            role="front", seconds=tuple(map(float, range(len(values)))), rss_bytes=values
        )

    assert growth(series(10, 50, *[100] * 8)) == 0
    assert growth(series(100, 100, 100, 100, 100, 100, 100, 100, 110, 110)) == pytest.approx(0.1)


def test_a_server_that_cannot_start_is_named_with_its_last_words() -> None:
    failing = [sys.executable, "-c", "raise SystemExit('no model')"]
    with (
        pytest.raises(CheckFailedError, match="mine ended with status 1: no model"),
        started(failing, "mine"),
    ):
        pass


def test_a_server_and_its_children_are_gone_afterwards() -> None:
    program = (
        "import subprocess, sys, signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_DFL)\n"
        "subprocess.Popen([sys.executable, '-c', 'import sys; sys.stdin.read()'],\n"
        "                 stdin=subprocess.PIPE)\n"
        "print('http://127.0.0.1:1', flush=True)\n"
        "signal.pause()\n"
    )
    with started([sys.executable, "-c", program], "mine") as (url, process):
        family = [process, *process.children()]
        assert (url, len(family)) == ("http://127.0.0.1:1", 2)
    assert not any(map(psutil.Process.is_running, family))


def test_cpu_time_is_that_of_the_work() -> None:
    busy = "print('http://127.0.0.1:1', flush=True)\nwhile True: pass"
    with started([sys.executable, "-c", busy], "busy") as (_, process):
        assert cpu_share(process, 0.5) > 0.2
    with started(launch().command, "idle") as (_, process):
        assert cpu_share(process, 0.5) < 0.1


def test_memory_is_read_of_every_process() -> None:
    with (
        started(launch().command, "known") as (_, process),
        memory_watched(process, 0.02) as memory,
    ):
        cpu_share(process, 0.3)
    (series,) = memory
    assert len(series.rss_bytes) > 5
    assert min(series.rss_bytes) > 5_000_000


def test_random_lengths_are_many_lengths_and_the_same_each_time() -> None:
    long = " ".join(["word"] * 400)
    made = measure.random_lengths([long, "", "short one"])
    lengths = [len(text.split()) for text in made]
    assert made == measure.random_lengths([long, "", "short one"])
    assert (min(lengths), len(made)) == (1, measure.SOAK_TEXTS)
    assert 200 < max(lengths) <= 256


def rate(server: str, number: int, value: float | None) -> Rate:
    return Rate(
        server=server,
        texts="t",
        round=number,
        requests_per_s=value,
        p50_ms=1.0,
        p99_ms=2.0,
        limited_by="server",
        summary="",
        noisy_because=(),
    )


def test_ratios_are_of_the_same_round() -> None:
    ours = [rate("trainkit fp32", n, value) for n, value in enumerate([100.0, 300.0, 90.0])]
    others = [rate("naive", n, value) for n, value in enumerate([10.0, 30.0, None])]
    (found,) = ratios((*ours, *others))
    assert (found.median, found.interval) == (10, Interval(10, 10))


def report(*, naive: float = 10.0, added_ms: float = 1.0, grown: float = 0.0) -> ServingFigures:
    rates = (rate("trainkit fp32", 0, 60.0), rate("naive", 0, naive))
    added = AddedTime(
        server="trainkit fp32",
        library_p50_ms=1.0,
        http_p50_ms=1.0 + added_ms,
        added_p50_ms=added_ms,
        interval_ms=Interval(added_ms, added_ms),
    )
    soak = Soak(
        server="trainkit fp32",
        seconds=600,
        highest_per_s=100,
        rate=70,
        requests=10,
        answered=10,
        errors={},
        p50_ms=1.0,
        p99_ms=None,
        max_ms=2.0,
        noisy_because=(),
        growth={"front": grown},
        memory=(),
    )
    return ServingFigures(
        command=(),
        date=datetime(2026, 1, 1, tzinfo=UTC),
        environment=describe(),
        plan=plan(),
        goals=ServingGoals(),
        rates=rates,
        ratios=tuple(ratios(rates)),
        added=(added,),
        soaks=(soak,),
        idle=(),
    )


def test_the_check_names_each_figure_that_misses_its_goal() -> None:
    check(report())
    with pytest.raises(CheckFailedError, match=r"3\.00x the rate of naive on t"):
        check(report(naive=20.0))
    relaxed = report(naive=20.0)
    (texts,) = relaxed.plan.texts
    texts = msgspec.structs.replace(texts, p99_below_ms=500.0)
    check(
        msgspec.structs.replace(relaxed, plan=msgspec.structs.replace(relaxed.plan, texts=(texts,)))
    )
    with pytest.raises(CheckFailedError, match=r"HTTP adds 1\.60 ms"):
        check(report(added_ms=1.6))
    with pytest.raises(CheckFailedError, match=r"front process .* grew by 6\.0%"):
        check(report(grown=0.06))
    failed = report()
    (soak,) = failed.soaks
    lost = msgspec.structs.replace(soak, answered=9, errors={"HTTP 503": 1})
    with pytest.raises(CheckFailedError, match=r"errors in the soak: .*503"):
        check(msgspec.structs.replace(failed, soaks=(lost,)))


@pytest.mark.parametrize(("mine", "theirs"), [(None, 10.0), (60.0, None)])
def test_a_goal_that_was_not_measured_is_not_reached(mine, theirs) -> None:
    rates = (rate("trainkit fp32", 0, mine), rate("naive", 0, theirs))
    found = msgspec.structs.replace(report(), rates=rates, ratios=tuple(ratios(rates)))
    with pytest.raises(CheckFailedError, match="no rate of both trainkit fp32 and naive on t"):
        check(found)


def test_the_tables_hold_what_was_measured() -> None:
    text = markdown(report())
    assert "| trainkit fp32, t | 50 ms | 60 (60) |" in text
    assert "trainkit fp32 bears 6.0 times the rate of naive (6.0 to 6.0)" in text
    assert "1.00 ms more" in text
    assert "0 of 10 failed" in text


def test_a_measurement_is_resumed_only_by_the_same_plan(tmp_path) -> None:
    work = tmp_path / "work"
    study._prepare(work, plan(), resume=False)
    (work / "idle-x.json").touch()
    study._prepare(work, plan(), resume=True)
    assert (work / "idle-x.json").exists()
    with pytest.raises(InputError, match="begun with other servers, texts or times"):
        study._prepare(work, plan(rounds=2), resume=True)
    study._prepare(work, plan(rounds=2), resume=False)
    assert not (work / "idle-x.json").exists()


@pytest.mark.slow
def test_the_whole_command_measures_four_servers(tmp_path) -> None:
    pytest.importorskip("litserve")
    pytest.importorskip("fastapi")
    from tests.bench import engine_process

    folder = engine_process.save_classifier(tmp_path / "bert", TEXTS)
    arguments = ["--classifier", str(folder), "--fp32", str(BUNDLE), "--int8", str(BUNDLE)]
    arguments += ["--trec", "sample", "--newsgroups", "sample"]
    arguments += ["--peers-python", sys.executable, "--quick"]
    arguments += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "serving.json")]
    done = CliRunner().invoke(study.STUDY.command, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    found = study.STUDY.load(tmp_path / "serving.json")
    names = ["trainkit fp32", "trainkit int8", "naive", "litserve"]
    assert [one.server for one in found.idle] == names
    assert len(found.rates) == 12
    assert all(soak.answered == soak.requests for soak in found.soaks)
    assert all({"front", "inference"} <= set(soak.growth) for soak in found.soaks)
    assert str(tmp_path) not in (tmp_path / "serving.json").read_text()
    # Nothing is measured twice.
    kept = (tmp_path / "work" / "idle-naive.json").stat().st_mtime_ns
    again = CliRunner().invoke(
        study.STUDY.command, [*arguments, "--resume"], catch_exceptions=False
    )
    assert again.exit_code == 0
    assert (tmp_path / "work" / "idle-naive.json").stat().st_mtime_ns == kept
    assert study.STUDY.load(tmp_path / "serving.json").rates == found.rates

"""Our clocks against others' on the same engine: MLPerf's LoadGen, and torch's own benchmark."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch.utils.benchmark

from tests.helpers.retry_timing import retry_timing
from trainkit.bench.measure.arrivals import arrivals
from trainkit.bench.race.worker import scheduled_turn, take_turn

loadgen = pytest.importorskip("mlperf_loadgen", reason="no wheel of it for this system")

SERVICE_S = 0.004
QUERIES = 600


def engine(item: int) -> None:
    """Take four milliseconds without the interpreter's lock, as runtimes do."""
    time.sleep(SERVICE_S)


def loadgen_run(folder: Path, configure: Callable[[object], None]) -> dict[str, float]:
    """Return the latencies in LoadGen's summary, in milliseconds, by their percentile."""
    settings = loadgen.TestSettings()
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.min_query_count = settings.max_query_count = QUERIES
    settings.min_duration_ms = 0
    configure(settings)

    def issue(queries: list[object]) -> None:
        for query in queries:
            engine(0)
            loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(query.id, 0, 0)])

    sut = loadgen.ConstructSUT(issue, lambda: None)
    library = loadgen.ConstructQSL(1, 1, lambda samples: None, lambda samples: None)
    log = loadgen.LogSettings()
    log.log_output.outdir = str(folder)
    log.log_output.copy_summary_to_stdout = False
    log.enable_trace = False
    loadgen.StartTestWithLogSettings(sut, library, settings, log)
    loadgen.DestroyQSL(library)
    loadgen.DestroySUT(sut)
    summary = (folder / "mlperf_log_summary.txt").read_text()
    found = re.findall(r"^([\d.]+) percentile latency \(ns\) *: (\d+)$", summary, re.MULTILINE)
    return {percent: int(nanoseconds) / 1e6 for percent, nanoseconds in found}


@retry_timing
def test_single_stream_is_loadgens(tmp_path: Path) -> None:
    def configure(settings: object) -> None:
        settings.scenario = loadgen.TestScenario.SingleStream

    theirs = loadgen_run(tmp_path, configure)
    turn = take_turn(engine, range(QUERIES), lambda passes, seconds: True)
    ours = 1000 * np.percentile(turn.batch_s[0], [50, 90])
    assert ours[0] == pytest.approx(theirs["50.00"], rel=0.05)
    assert ours[1] == pytest.approx(theirs["90.00"], rel=0.25)


@retry_timing
def test_server_latencies_are_loadgens(tmp_path: Path) -> None:
    """At half load, where one request in two waits for another, by theirs and by ours."""
    rate = 0.5 / SERVICE_S

    def configure(settings: object) -> None:
        settings.scenario = loadgen.TestScenario.Server
        settings.server_target_qps = rate
        settings.server_target_latency_ns = 10**9

    theirs = loadgen_run(tmp_path, configure)
    due_s = arrivals("poisson", rate, QUERIES, seed=1)
    ours = 1000 * np.percentile(scheduled_turn(engine, [0], due_s).batch_s[0], [50, 90])
    assert ours[1] > 1300 * SERVICE_S  # it queued
    # Two samples of arrivals, which differ by themselves.
    assert ours[0] == pytest.approx(theirs["50.00"], rel=0.25)
    assert ours[1] == pytest.approx(theirs["90.00"], rel=0.4)


@pytest.mark.timing
def test_a_turn_is_what_torch_measures() -> None:
    first, second = torch.rand(200, 400), torch.rand(400, 400)
    timer = torch.utils.benchmark.Timer("first @ second", globals=locals(), num_threads=1)
    torch.set_num_threads(1)
    ratios = []
    for _ in range(7):  # in turns: the machine's speed changes
        theirs = timer.timeit(200).mean
        turn = take_turn(lambda item: first @ second, range(200), lambda passes, seconds: True)
        ratios.append(np.mean(turn.batch_s[0]) / theirs)
    assert 0.8 < np.median(ratios) < 1.25

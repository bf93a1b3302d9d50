"""What is measured of one server: its added time, and a soak; and how it is warmed for either."""

import http.client
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias
from urllib.parse import urlsplit

import msgspec

from trainkit.bench.load import generator
from trainkit.bench.load.settings import LoadSettings
from trainkit.bench.measure.statistics import bootstrap_interval
from trainkit.bench.studies.serving.process import memory_watched, started
from trainkit.bench.studies.serving.result import AddedTime, ServerInfo, ServingPlan, Soak, growth
from trainkit.serve.classifier import Classifier
from trainkit.serve.errors import CheckFailedError

WARM_REQUESTS = 30
BLOCK = 20  # texts that the library, then the server, takes one after the other
PAUSE_SECONDS = 0.1  # in which the other one's threads stop spinning
# Finds the rate that the server can carry at all, of which the soak takes its share.
SOAK_P99_MS = 500.0
SOAK_TEXTS = 2000
SOAK_WORDS = 256

ProgressCallback: TypeAlias = Callable[[str], None]


class ServerLaunch(NamedTuple):
    """A server and the command that starts it; ``bundle`` is of trainkit's own."""

    server: ServerInfo
    command: tuple[str, ...]
    bundle: Path | None = None


def random_lengths(texts: Sequence[str], seed: int = 0) -> list[str]:
    """Return the beginnings of texts, from 1 to 256 words, every power of two as likely."""
    rng = random.Random(seed)
    chosen: list[str] = []
    while len(chosen) < SOAK_TEXTS:
        words = rng.choice(texts).split()
        kept = " ".join(words[: round(2 ** rng.uniform(0, SOAK_WORDS.bit_length() - 1))])
        chosen.extend([kept] if kept else [])
    return chosen


def named(on_progress: ProgressCallback, name: str) -> ProgressCallback:
    """Put a name before each reported step."""
    return lambda step: on_progress(f"{name}: {step}")


def load_settings(plan: ServingPlan, rate: float, p99_below_ms: float | None) -> LoadSettings:
    """Return the settings of a search from ``rate`` on."""
    return LoadSettings(
        rate=rate,
        duration_s=plan.duration_s,
        warm_up_s=plan.warm_up_s,
        max_seconds=plan.max_search_s,
        p99_below_ms=p99_below_ms,
    )


def added_time(
    launch: ServerLaunch, texts: Sequence[str], plan: ServingPlan, on_progress: ProgressCallback
) -> AddedTime:
    """Time single texts in this process and over one connection, in alternating blocks.

    Both have as many threads. The first call of a block wakes threads and is not counted.
    """
    assert launch.bundle is not None
    classify = Classifier.load(launch.bundle, threads=plan.threads)
    library: list[tuple[float, ...]] = []
    served: list[tuple[float, ...]] = []
    with started(launch.command, launch.server.name) as (url, _):
        warm(f"{url}/classify", texts)
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        for number in range(plan.added_blocks):
            on_progress(
                f"{launch.server.name}: one client, block {number + 1} of {plan.added_blocks}"
            )
            block = [texts[(number * BLOCK + place) % len(texts)] for place in range(BLOCK)]
            library.append(_timed(classify, block))
            served.append(_timed(lambda text: _post(connection, [text]), block))
        connection.close()
    library_p50, http_p50 = (_median(chain) for chain in (library, served))
    pairs = zip(served, library, strict=True)
    own = [statistics.median(over) - statistics.median(inside) for over, inside in pairs]
    return AddedTime(
        server=launch.server.name,
        library_p50_ms=library_p50,
        http_p50_ms=http_p50,
        added_p50_ms=http_p50 - library_p50,
        interval_ms=bootstrap_interval(own),
    )


def _median(blocks: Sequence[Sequence[float]]) -> float:
    return statistics.median(value for block in blocks for value in block)


def _timed(call: Callable[[str], object], texts: Sequence[str]) -> tuple[float, ...]:
    time.sleep(PAUSE_SECONDS)
    call(texts[0])
    taken = []
    for text in texts:
        start = time.perf_counter()
        call(text)
        taken.append(round(1000 * (time.perf_counter() - start), 4))
    return tuple(taken)


def _post(connection: http.client.HTTPConnection, texts: Sequence[str]) -> None:
    """Send one request and read its answer whole; raises ``CheckFailedError`` for any but 200."""
    body = msgspec.json.encode({"texts": texts})
    connection.request("POST", "/classify", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    if response.status != 200:
        raise CheckFailedError(f"/classify answered HTTP {response.status}: {content[:200]!r}")


def warm(url: str, texts: Sequence[str]) -> None:
    """Ask one text after the other until it is warm; it may not listen yet at the beginning."""
    until = time.monotonic() + 60
    while True:
        try:
            connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
            connection.connect()
            break
        except ConnectionRefusedError:
            if time.monotonic() > until:
                raise CheckFailedError(f"nothing listens at {url} after a minute.") from None
            time.sleep(PAUSE_SECONDS)
    try:
        for number in range(WARM_REQUESTS):
            _post(connection, [texts[number % len(texts)]])
    finally:
        connection.close()


def soak(
    launch: ServerLaunch, texts: Sequence[str], plan: ServingPlan, on_progress: ProgressCallback
) -> Soak:
    """Find the rate for these texts, then load the same process for long at a share of it."""
    name = launch.server.name
    with started(launch.command, name) as (url, process):
        target = generator.Target(f"{url}/classify", texts)
        warm(target.url, texts)
        settings = load_settings(plan, plan.texts[-1].rate, SOAK_P99_MS)
        found = generator.run(
            target, settings, on_progress=named(on_progress, f"{name}, before the soak")
        )
        if found.search is None or found.search.rate is None:
            raise CheckFailedError(f"{name} has no rate to soak it at: {found.search}")
        rate = plan.soak_share * found.search.rate
        on_progress(f"{name}: soak, {plan.soak_s / 60:.1f} minutes at {rate:.0f} requests/s")
        settings = LoadSettings(
            rate=rate,
            duration_s=plan.soak_s,
            warm_up_s=plan.warm_up_s,
            max_requests=10_000_000,
        )
        due = generator.schedule(settings)
        with memory_watched(process, min(5.0, plan.soak_s / 20)) as memory:
            run = generator.generate(target, settings, due)
    if run.interrupted:
        raise KeyboardInterrupt
    longest = max(len(series.seconds) for series in memory)
    if any(len(series.seconds) < 0.9 * longest for series in memory):
        raise CheckFailedError(f"a process of {name} came or went during the soak.")
    grown: dict[str, float] = {}
    for series in memory:
        grown[series.role] = max(growth(series), grown.get(series.role, -1.0))
    return Soak(
        server=name,
        seconds=plan.soak_s,
        highest_per_s=found.search.rate,
        rate=rate,
        requests=run.requests,
        answered=run.answered,
        errors=run.errors,
        p50_ms=run.p50_ms,
        p99_ms=run.p99_ms,
        max_ms=run.max_ms,
        noisy_because=run.noisy_because,
        growth=grown,
        memory=tuple(memory),
    )

"""An open-loop load generator for text classifiers over HTTP.

A request is sent when it is due, even if others have no answer yet, and its latency counts from
then: a server that stalls for a second is charged for every request that users would have sent in
that second. A closed loop would hide them ("coordinated omission", Gil Tene, in wrk2).
"""

import asyncio
import errno
import gc
import select
import selectors
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar

import aiohttp
import msgspec
import numpy as np
from numpy.typing import NDArray
from yarl import URL

from trainkit.bench.load.protocols import PROTOCOLS, public_url, split_url
from trainkit.bench.load.result import (
    MIN_FOR_P99,
    OK,
    TIMEOUT,
    LoadResult,
    LoadRun,
    Sample,
    summarise,
)
from trainkit.bench.load.search import find_rate, hopeless
from trainkit.bench.load.settings import LoadSettings
from trainkit.bench.measure import environment
from trainkit.bench.measure.arrivals import arrivals, arrivals_within
from trainkit.serve.errors import InputError

# Below uvicorn's 5 s: the side that sends must be the one that drops an idle connection, or now and
# then a request meets a connection that the server is just closing.
KEEP_ALIVE_SECONDS = 4.0
HEAD_START_SECONDS = 0.02
REFUSED = "connection refused"
FAILED = "connection failed"
RESET = "connection reset"
INVALID = "invalid answer"
TOO_MANY = 429  # what a full queue answers; any other 4xx is a request that will never work

ProgressCallback = Callable[[str], None]
Watch = Callable[[Sample], bool]
T = TypeVar("T")


class Target(NamedTuple):
    """Where requests go and what is in them; ``texts`` repeat in order. Not for the report."""

    url: str
    texts: Sequence[str]
    headers: Mapping[str, str] = {}


def run(
    target: Target,
    settings: LoadSettings,
    *,
    data: str = "",
    command: Sequence[str] = (),
    on_progress: ProgressCallback = lambda step: None,
) -> LoadResult:
    """Load the server at one rate, or search for the highest if ``p99_below_ms`` is given.

    ``data`` and ``command`` are for the report and must be free of secrets. An
    interrupt ends it early, with what was measured. Raises ``InputError`` if nothing listens or the
    first request is refused.
    """
    _check(target)
    before = environment.describe()
    _first_request(target, settings)
    search = None
    if settings.p99_below_ms is None:
        on_progress(f"{settings.rate:g} requests/s")
        runs = [generate(target, settings, schedule(settings))]
    else:
        runs, search = find_rate(
            lambda rate: _probe(target, settings, rate),
            start=settings.rate,
            p99_below_ms=settings.p99_below_ms,
            max_seconds=settings.max_seconds,
            seconds_of=lambda rate: _probe_seconds(settings, rate),
            on_progress=on_progress,
        )
    noise = tuple(f"at {one.rate:g}/s {why}" for one in runs for why in one.noisy_because)
    return LoadResult(
        command=tuple(command),
        date=datetime.now(UTC).replace(microsecond=0),
        url=public_url(target.url),
        data=data,
        texts=len(target.texts),
        settings=settings,
        environment=before,
        noisy=bool(noise),
        noisy_because=noise,
        runs=tuple(runs),
        search=search,
    )


def schedule(settings: LoadSettings, min_requests: int = 1) -> NDArray[np.float64]:
    """Return all due times, the warm-up's too; ``min_requests`` are counted however long it takes.

    ``max_requests`` is the most that are counted.
    """
    kind, rate, seed = settings.arrivals, settings.rate, settings.seed
    warm_up = len(arrivals_within(kind, rate, settings.warm_up_s, seed))
    # Twice as long as the most requests take: an array that no memory holds is never made.
    counted_s = min(settings.duration_s, 2 * settings.max_requests / rate + 1)
    within = len(arrivals_within(kind, rate, settings.warm_up_s + counted_s, seed)) - warm_up
    counted = min(max(within, min_requests), settings.max_requests)
    return arrivals(kind, rate, warm_up + counted, seed)


def generate(
    target: Target,
    settings: LoadSettings,
    due: NDArray[np.float64],
    watch: Watch = lambda sample: False,
) -> LoadRun:
    """Send a request at each of the ``due`` seconds and wait for the answers.

    ``watch`` sees every counted sample and ends the run by returning True; so does an interrupt.
    It takes ``due[-1] + timeout_s`` at most.
    """
    firing = _Firing(target, settings, due, watch)
    cpu, started = time.process_time(), time.perf_counter()
    theft = environment.cpu_steal_monitor()
    gc.collect()
    gc.freeze()  # what was imported need not be searched for garbage between two requests
    try:
        _in_loop(firing.run())
    finally:
        gc.unfreeze()
    counted = [sample for sample in firing.samples if sample.due_s >= settings.warm_up_s]
    return summarise(
        counted,
        rate=settings.rate,
        warm_up_requests=len(firing.samples) - len(counted),
        unfinished=firing.started - len(firing.samples),
        cpu_share=(time.process_time() - cpu) / (time.perf_counter() - started),
        interrupted=firing.interrupted,
        stolen=theft(),
    )


class _Firing:
    """One run: every request is a task, and a semaphore holds back those beyond the connections."""

    def __init__(
        self, target: Target, settings: LoadSettings, due: NDArray[np.float64], watch: Watch
    ) -> None:
        self.target = target
        self.settings = settings
        self.due = due.tolist()
        self.watch = watch
        self.free = asyncio.Semaphore(settings.connections)
        self.stop = asyncio.Event()
        self.samples: list[Sample] = []
        self.started = 0
        self.interrupted = False
        self.zero = 0.0  # the loop's time when the schedule begins

    async def run(self) -> None:
        """Fire until all is answered, or it is stopped."""
        async with _session(self.target) as session:
            stopped = asyncio.create_task(self.stop.wait())
            fired = asyncio.create_task(self._fire(session))
            try:
                await asyncio.wait({fired, stopped}, return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:  # asyncio.Runner's answer to the first Ctrl-C
                self.interrupted = True
            for task in (fired, stopped):
                task.cancel()
            outcomes = await asyncio.gather(fired, stopped, return_exceptions=True)
            if isinstance(outcomes[0], Exception):
                raise outcomes[0]

    async def _fire(self, session: aiohttp.ClientSession) -> None:
        loop = asyncio.get_running_loop()
        self.zero = loop.time() + HEAD_START_SECONDS
        async with asyncio.TaskGroup() as requests:
            for number, due_s in enumerate(self.due):
                await asyncio.sleep(max(self.zero + due_s - loop.time(), 0))
                self.started += 1
                requests.create_task(self._request(session, number, due_s))

    async def _request(self, session: aiohttp.ClientSession, number: int, due_s: float) -> None:
        loop = asyncio.get_running_loop()
        due_at, started_at = self.zero + due_s, loop.time()
        queued, sent_at = self.free.locked(), None
        try:
            async with asyncio.timeout_at(due_at + self.settings.timeout_s), self.free:
                sent_at = loop.time()
                outcome = await _ask(session, self.target, self.settings, number)
        except TimeoutError:
            outcome = TIMEOUT
        now = loop.time()
        sample = Sample(
            due_s=round(due_s, 6),
            start_delay_s=round(started_at - due_at, 6),
            send_delay_s=round((now if sent_at is None else sent_at) - due_at, 6),
            latency_s=round(now - due_at, 6),
            queued=queued,
            outcome=outcome,
        )
        self.samples.append(sample)
        if due_s >= self.settings.warm_up_s and self.watch(sample):
            self.stop.set()


async def _ask(
    session: aiohttp.ClientSession, target: Target, settings: LoadSettings, number: int
) -> str:
    """Send the request of this number; returns "ok" or the kind of error."""
    count = settings.texts_per_request
    first = number * count
    texts = [target.texts[place % len(target.texts)] for place in range(first, first + count)]
    protocol = PROTOCOLS[settings.protocol]
    body = msgspec.json.encode(protocol.body(texts))
    try:
        async with session.post(URL(target.url), data=body, allow_redirects=False) as response:
            content = await response.read()
    except aiohttp.ClientConnectorCertificateError:
        return f"{FAILED} (certificate)"
    except aiohttp.ClientConnectorError as error:
        code = errno.errorcode.get(error.os_error.errno or 0, type(error.os_error).__name__)
        return REFUSED if code == "ECONNREFUSED" else f"{FAILED} ({code})"
    except (aiohttp.ServerDisconnectedError, aiohttp.ClientPayloadError, OSError):
        return RESET
    except aiohttp.ClientError:  # what came is not HTTP
        return INVALID
    if response.status != 200:
        return f"HTTP {response.status}"
    return OK if protocol.answers(content) == count else INVALID


def _session(target: Target) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS),
        headers={"Content-Type": "application/json", **target.headers},
        timeout=aiohttp.ClientTimeout(),  # ours counts from the moment that a request is due
        cookie_jar=aiohttp.DummyCookieJar(),
    )


def _probe(target: Target, settings: LoadSettings, rate: float) -> LoadRun:
    """Take one sample of a search, large enough to carry a p99; it ends once it has failed."""
    assert settings.p99_below_ms is not None
    at_rate = msgspec.structs.replace(settings, rate=rate)
    due = schedule(at_rate, MIN_FOR_P99)
    counted = int((due >= settings.warm_up_s).sum())
    watch = hopeless(settings.p99_below_ms, counted)
    found = generate(target, at_rate, due, watch)
    if not found.interrupted:
        # What an overloaded server still has in its queue is not the next rate's fault.
        _one_request(target, settings)
    return found


def _probe_seconds(settings: LoadSettings, rate: float) -> float:
    due = schedule(msgspec.structs.replace(settings, rate=rate), MIN_FOR_P99)
    return float(due[-1])


def _one_request(target: Target, settings: LoadSettings) -> str:
    async def ask() -> str:
        async with _session(target) as session:
            try:
                async with asyncio.timeout(settings.timeout_s):
                    return await _ask(session, target, settings, 0)
            except TimeoutError:
                return TIMEOUT

    return _in_loop(ask())


def _first_request(target: Target, settings: LoadSettings) -> None:
    """Refuse a server that is not there, or that takes no request of this kind."""
    outcome, url = _one_request(target, settings), public_url(target.url)
    if outcome == REFUSED:
        raise InputError(f"nothing listens at {url} (connection refused); start the server first.")
    if outcome.startswith(FAILED):
        raise InputError(f"there is no way to {url}: {outcome}; check host, port and scheme.")
    status = int(outcome.split()[1]) if outcome.startswith("HTTP") else 0
    if 300 <= status < 500 and status != TOO_MANY:
        raise InputError(
            f"{url} answered the first request with {outcome}; check the path, --protocol "
            f"(now {settings.protocol}) and, for 401 or 403, --header."
        )


def _check(target: Target) -> None:
    given = {name.lower() for name in target.headers}
    if split_url(target.url).username is not None and "authorization" in given:
        raise InputError(
            "the URL holds a user and --header an Authorization; a request has room for one: "
            "leave the other out."
        )
    for name, value in target.headers.items():
        if not (name + value).isprintable() or not name.isascii() or " " in name:
            raise InputError(
                f"--header number {[*target.headers].index(name) + 1} is not an HTTP "
                "header; take blanks in the name, line breaks and control characters out of it."
            )
    if not target.texts:
        raise InputError("there is no text to send; give --data with one at least.")


class _PreciseSelector(getattr(selectors, "EpollSelector", selectors.DefaultSelector)):  # type: ignore[misc]
    """Wait in microseconds: epoll rounds up to a millisecond, which every latency would carry."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout > 0 and hasattr(select, "epoll"):
            select.select([self.fileno()], [], [], timeout)
            timeout = 0
        return super().select(timeout)  # type: ignore[no-any-return]


def _in_loop(work: Coroutine[Any, Any, T]) -> T:
    def loop() -> asyncio.AbstractEventLoop:
        return asyncio.SelectorEventLoop(_PreciseSelector())

    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(work)

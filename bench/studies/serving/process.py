"""A server under measurement: started, found ready, looked at from outside, and surely ended."""

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import psutil

from trainkit.bench.race.worker_process import last_line
from trainkit.serve.errors import CheckFailedError

ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")
START_SECONDS = 120.0
STOP_SECONDS = 15.0
POLL_SECONDS = 0.05
INFERENCE = "trainkit.serve.http.model_worker"


class MemorySeries(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Resident bytes of one process, at seconds since the load began.

    ``role`` is "inference" for a process that holds a model, "front" for the one that was started,
    "other" for any third.
    """

    role: str
    seconds: tuple[float, ...]
    rss_bytes: tuple[int, ...]


@contextlib.contextmanager
def started(command: Sequence[str], name: str) -> Iterator[tuple[str, psutil.Process]]:
    """Start a server; gives its base URL, as it prints it, and its process.

    All it prints goes to a file, which cannot fill up as a pipe would. Raises
    ``CheckFailedError`` if it ends, or prints no address in time. At the end it gets SIGTERM, and
    its remaining processes are killed.
    """
    with tempfile.NamedTemporaryFile() as log:
        # A session of its own: Ctrl-C ends the measurement, which then ends the server.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield _address(process, Path(log.name), name), psutil.Process(process.pid)
        finally:
            _stop(process)


def _address(process: "subprocess.Popen[bytes]", log: Path, name: str) -> str:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        status = process.poll()
        printed = log.read_text(encoding="utf-8", errors="replace")
        if status is not None:
            raise CheckFailedError(f"{name} ended with status {status}: {last_line(printed)}")
        if found := ADDRESS.search(printed):
            return found[0]
        time.sleep(POLL_SECONDS)
    raise CheckFailedError(f"{name} printed no address within {START_SECONDS:g} s.")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        psutil.wait_procs(children, timeout=STOP_SECONDS)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):  # nothing of its session is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def cpu_share(process: psutil.Process, seconds: float) -> float:
    """Return the CPU seconds a second that a server and its processes use, measured for a while."""
    family = [process, *process.children(recursive=True)]
    before, began = sum(map(_cpu_s, family)), time.perf_counter()
    time.sleep(seconds)
    return (sum(map(_cpu_s, family)) - before) / (time.perf_counter() - began)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@contextlib.contextmanager
def memory_watched(process: psutil.Process, every_s: float) -> Iterator[list[MemorySeries]]:
    """Read the memory of a server's processes in a thread; the list is filled at the end.

    A process that ends meanwhile has a series that ends, and one that comes has a series of its
    own: a restart is seen.
    """
    found: list[MemorySeries] = []
    points: dict[psutil.Process, list[tuple[float, int]]] = {}
    roles: dict[psutil.Process, str] = {}
    stop = threading.Event()
    began = time.monotonic()

    def watch() -> None:
        while not stop.wait(every_s):
            for one in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    if one not in roles:
                        roles[one] = _role(one, process)
                    now = round(time.monotonic() - began, 2)
                    points.setdefault(one, []).append((now, one.memory_info().rss))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
    for one, pairs in points.items():
        seconds, rss_bytes = zip(*pairs, strict=True)
        found.append(MemorySeries(role=roles[one], seconds=seconds, rss_bytes=rss_bytes))


def _role(one: psutil.Process, front: psutil.Process) -> str:
    if INFERENCE in one.cmdline():
        return "inference"
    return "front" if one == front else "other"

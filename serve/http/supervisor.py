"""Several HTTP workers behind one port: started, each on its cores, replaced, reloaded and ended.

The supervisor holds the listening socket and no model. A worker that dies is replaced; one whose
event loop hangs, or which is stopped, is killed first. Connections that wait for a dead worker are
accepted by the others, which is why they share one socket and SO_REUSEPORT is not used.
"""

import asyncio
import contextlib
import logging
import logging.config
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
from prometheus_client import multiprocess

from trainkit.serve.cores import affinity, usable_cores
from trainkit.serve.errors import CheckFailedError, InputError
from trainkit.serve.http import admin
from trainkit.serve.http.logs import config as log_config
from trainkit.serve.http.run import (
    LINE_BYTES,
    LoadOrder,
    Shutdown,
    WorkerConfig,
    WorkerReport,
    announce,
    run_loop,
)
from trainkit.serve.http.sockets import DrainingServer, first, listen

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
LASTED_S = 60.0  # a worker that lived longer is restarted without a pause
EXIT_S = 5.0  # for a worker to exit after its drain and grace times

log = logging.getLogger("trainkit.serve")


def shares(cores: Sequence[int], workers: int) -> list[tuple[int, ...]]:
    """Split the cores into neighbours, as evenly as possible; each worker has at least one.

    >>> shares([0, 1, 2, 3, 4], 2)
    [(0, 1), (2, 3, 4)]
    >>> shares([0, 1], 3)
    [(0,), (1,), (0,)]
    """
    count = len(cores)
    if workers > count:
        return [(cores[number % count],) for number in range(workers)]
    return [
        tuple(cores[number * count // workers : (number + 1) * count // workers])
        for number in range(workers)
    ]


class HTTPWorker:
    """One worker's process and its control channel; a restart makes new ones.

    ``threads`` is the most that a model uses by default.
    """

    def __init__(self, number: int, cores: tuple[int, ...], threads: int, metrics: Path) -> None:
        self.number = number
        self.cores = cores
        self.threads = threads
        self.metrics = metrics
        self.process: asyncio.subprocess.Process | None = None
        self.ready = False
        self._turn = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, config: WorkerConfig, listener: socket.socket) -> WorkerReport:
        """Start the process; its error, or its end, is in the report.

        Raises ``OSError`` if the system cannot start a process.
        """
        ours, theirs = socket.socketpair()
        self.reader, self.writer = await asyncio.open_connection(sock=ours, limit=LINE_BYTES)
        try:
            with theirs:
                self.process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-P",  # a file of the working directory must not be imported as a library
                    "-m",
                    "trainkit.serve.http.run",
                    str(theirs.fileno()),
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), listener.fileno()),
                    env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(self.metrics)},
                    start_new_session=True,  # Ctrl-C in a terminal is for the supervisor
                )
        except OSError:
            self.writer.close()
            raise
        self._reports: asyncio.Queue[WorkerReport] = asyncio.Queue()
        self._silent_s = 0.0  # since the last heartbeat, while this process was awake
        self._bound_s = config.settings.start_s  # until the interpreter is up
        self._send(self.config(config, listener))
        self._tasks = [
            asyncio.create_task(self._receive(config.silent_s)),
            asyncio.create_task(self._watch(config.ping_s)),
        ]
        report = await self._report()
        self.ready = report.error is None
        return report

    def config(self, config: WorkerConfig, listener: socket.socket) -> WorkerConfig:
        """Return this worker's own configuration."""
        # A worker cannot see its share of a quota, nor of cores that it is not bound to.
        settings = msgspec.structs.replace(config.settings, max_threads=self.threads)
        return msgspec.structs.replace(
            config, settings=settings, cores=self.cores, listener=listener.fileno()
        )

    async def load(self, order: LoadOrder) -> WorkerReport:
        """Have one model loaded again."""
        async with self._turn:
            self._send(order)
            return await self._report()

    def _send(self, message: WorkerConfig | LoadOrder) -> None:
        self.writer.write(msgspec.json.encode(message) + b"\n")

    async def _report(self) -> WorkerReport:
        """Wait for the next report, or for the end of the channel."""
        report = asyncio.ensure_future(self._reports.get())
        try:
            await asyncio.wait({report, self._tasks[0]}, return_when=asyncio.FIRST_COMPLETED)
            if report.done():
                return report.result()
            return WorkerReport(error=f"worker {self.number} ended unexpectedly.", exit_code=1)
        finally:
            report.cancel()

    async def _receive(self, silent_s: float) -> None:
        """Read reports and heartbeats until the worker closes the channel."""
        with contextlib.suppress(ConnectionError):
            while line := await self.reader.readline():
                self._silent_s, self._bound_s = 0.0, silent_s
                if line != b"\n":
                    self._reports.put_nowait(msgspec.json.decode(line, type=WorkerReport))

    async def _watch(self, ping_s: float) -> None:
        """Kill the worker when its heartbeats stop."""
        while self._silent_s < self._bound_s:
            await asyncio.sleep(ping_s)
            self._silent_s += ping_s
        assert self.process
        log.error(
            "worker %d (pid %d) did not answer for %g s and is killed",
            self.number,
            self.process.pid,
            self._bound_s,
        )
        self.kill()

    def kill(self) -> None:
        """Kill the process and its model processes, which may be stopped as it is."""
        if self.process and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    async def ended(self) -> int:
        """Wait for the process to end; returns its exit code, or minus the signal."""
        assert self.process
        status = await self.process.wait()
        self.ready = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()
        return status

    def terminate(self) -> None:
        """Send SIGTERM."""
        if self.process and self.process.returncode is None:
            self.process.terminate()

    async def close(self) -> None:
        """Kill it, and leave no zombie."""
        if self.process:
            self.kill()
            await self.ended()


class Supervisor:
    """All workers, and the versions that they serve."""

    def __init__(
        self, config: WorkerConfig, listener: socket.socket, metrics: Path, workers: int
    ) -> None:
        self.config = config
        self.listener = listener
        self.metrics = metrics
        self.stop = Shutdown(config.drain_s)
        self.changing = asyncio.Lock()  # the versions; a worker that starts must not miss a load
        self.versions: dict[str, str] = {}
        usable = usable_cores()
        if workers > usable:
            log.warning(
                "%d workers share %d cores; more cores help, more workers do not", workers, usable
            )
        cores = affinity()
        # A CPU quota below the number of cores is shared out as well.
        share = max(1, usable // workers) if usable < len(cores) else usable
        self.workers = [
            HTTPWorker(number, own, min(len(own), share), metrics)
            for number, own in enumerate(shares(cores, workers))
        ]

    async def start(self) -> None:
        """Start all workers; after an error, which is raised, none is left running."""
        reports = await asyncio.gather(
            *(worker.start(self.config, self.listener) for worker in self.workers)
        )
        self.versions = reports[0].versions
        errors = [_error(report) for report in reports if report.error is not None]
        if not errors and any(report.versions != self.versions for report in reports):
            errors = [
                InputError("a bundle's folder changed while the workers opened it; start again.")
            ]
        if errors:
            await self.kill()
            raise errors[0]

    async def kill(self) -> None:
        """Kill every worker."""
        await asyncio.gather(*(worker.close() for worker in self.workers))

    async def keep(self, worker: HTTPWorker) -> None:
        """Replace one worker whenever it dies, until the server shuts down."""
        clock = asyncio.get_running_loop().time
        pause_s, began = 0.0, clock()
        while True:
            pid = worker.process.pid if worker.process else 0
            status = await worker.ended()
            multiprocess.mark_process_dead(pid, str(self.metrics))  # type: ignore[no-untyped-call]
            if self.stop.drain.is_set():
                return
            if clock() - began > LASTED_S:
                pause_s = 0.0
            message = "worker %d (pid %d) ended with %d; it is started again in %.1f s"
            log.error(message, worker.number, pid, status, pause_s)
            report = None
            while report is None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.stop.drain.wait(), pause_s)
                    return
                pause_s = min(max(2 * pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
                began = clock()
                report = await self._restart(worker)
            if report.error is not None:
                log.error("worker %d does not start: %s", worker.number, report.error)
            elif report.versions != self.versions:
                log.error(
                    "worker %d serves other versions than the others, as a bundle's folder was "
                    "changed and not loaded; send SIGHUP",
                    worker.number,
                )
            else:
                log.info("worker %d is back", worker.number)
            if self.stop.drain.is_set():  # it started after the others got their signal
                worker.terminate()

    async def _restart(self, worker: HTTPWorker) -> WorkerReport | None:
        """Start it with the current models; None if the server shuts down or it fails for now."""
        async with self.changing:
            if self.stop.drain.is_set():
                return None
            try:
                return await worker.start(self.config, self.listener)
            except OSError as error:  # no memory or no process: the others serve meanwhile
                log.error("worker %d cannot be started: %s", worker.number, error)
                return None

    def index(self) -> list[admin.Entry]:
        """Return every model's version; it is ready if one worker is."""
        state = "READY" if any(worker.ready for worker in self.workers) else "UNAVAILABLE"
        return [admin.Entry(name, version, state) for name, version in self.versions.items()]

    async def load(self, name: str, folder: Path | None = None) -> str:
        """Load a model in one worker and then in all; returns the version.

        If the first refuses it, its error is raised and nothing changed.
        """
        order = LoadOrder(name, None if folder is None else str(folder))
        async with self.changing:
            running = [worker for worker in self.workers if worker.ready]
            if not running:
                raise CheckFailedError("no worker is running; see the server's log.")
            report = await running[0].load(order)
            if report.error is not None:
                raise _error(report)
            if order.folder:  # for workers that start later
                folders = self.config.folders | {name: order.folder}
                self.config = msgspec.structs.replace(self.config, folders=folders)
            self.versions = report.versions
            others = await asyncio.gather(*(worker.load(order) for worker in running[1:]))
        failed = [one.error for one in others if one.error or one.versions != self.versions]
        if failed:
            raise CheckFailedError(
                f"{len(failed)} of {len(running)} workers still serve the old version of {name} "
                f"({failed[0] or 'the folder changed meanwhile'}); load it again."
            )
        return self.versions[name]

    async def load_all(self) -> None:
        """Load every model from its folder again; errors are logged."""
        for name in self.config.folders:
            try:
                await self.load(name)
            except (InputError, CheckFailedError) as error:
                log.error("model %s: %s", name, error)

    async def end(self) -> None:
        """Terminate all workers, and kill those that do not end; passes on a second signal."""
        self.listener.close()  # else connections would wait for workers that are gone
        for worker in self.workers:
            worker.terminate()
        ended = asyncio.gather(*(one.process.wait() for one in self.workers if one.process))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.drain_s + self.config.grace_s + EXIT_S):
                await first(self.stop.now.wait(), asyncio.shield(ended))
        if not ended.done():
            for worker in self.workers:
                worker.terminate()
            await first(asyncio.sleep(1), asyncio.shield(ended))
        for worker in self.workers:
            if worker.process and worker.process.returncode is None:
                log.error("worker %d does not end and is killed", worker.number)
                worker.kill()
        await ended

    async def supervise(self, admin_listener: socket.socket | None) -> int:
        """Start, keep and end the workers; returns the exit code."""
        stop, loads = self.stop, set[asyncio.Task[None]]()
        with stop.signals():
            try:
                await stop.unless(self.start())
                if stop.drain.is_set():
                    return 0
                stop.on_sighup = lambda: loads.add(asyncio.ensure_future(self.load_all()))
                async with asyncio.TaskGroup() as group:
                    for worker in self.workers:
                        group.create_task(self.keep(worker))
                    if admin_listener:
                        listen(admin_listener)
                        app = admin.application(self.index, self.load, self.config.token)
                        server = DrainingServer(app, admin_listener, self.config.grace_s)
                        group.create_task(server.run_until(stop.drain, stop.now))
                    announce(self.listener, admin_listener)
                    await stop.drain.wait()
                    await self.end()
            finally:
                for load in loads:
                    load.cancel()
                await asyncio.gather(*loads, return_exceptions=True)
                await self.kill()
        return 1 if stop.now.is_set() else 0


def _error(report: WorkerReport) -> InputError | CheckFailedError:
    refused = report.exit_code == InputError.exit_code
    return (InputError if refused else CheckFailedError)(report.error)


def run(
    config: WorkerConfig,
    workers: int,
    listener: socket.socket,
    admin_listener: socket.socket | None,
) -> int:
    """Serve with several workers; the address is printed once all are ready."""
    logging.config.dictConfig(log_config(config.log_level))
    with tempfile.TemporaryDirectory(prefix="trainkit-metrics-") as metrics:

        async def main() -> int:
            return await Supervisor(config, listener, Path(metrics), workers).supervise(
                admin_listener
            )

        return run_loop(main())

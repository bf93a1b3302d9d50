"""Several fronts behind one port: start them, each on its cores; replace, reload and end them.

The supervisor holds the listening socket and no model. A front that dies or hangs is replaced; see
:mod:`trainkit.serve.http.http_worker`. Connections that wait for a front that died are taken by the
others, which is why they share one socket and SO_REUSEPORT is not used.
"""

import asyncio
import contextlib
import logging
import logging.config
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
from prometheus_client import multiprocess

from trainkit.serve.cores import affinity, usable_cores
from trainkit.serve.errors import CheckFailedError, InputError
from trainkit.serve.http import admin
from trainkit.serve.http.http_worker import HTTPWorker
from trainkit.serve.http.logs import config as log_config
from trainkit.serve.http.run import Load, Report, Shutdown, WorkerConfig, announce, run_loop
from trainkit.serve.http.sockets import Server, first, listen

__all__ = ["run", "shares"]

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
LASTED_S = 60.0  # after which a front that dies is started again without a pause
EXIT_S = 5.0  # for a front to exit once its own time to end is over

log = logging.getLogger("trainkit.serve")


def shares(cores: Sequence[int], workers: int) -> list[tuple[int, ...]]:
    """Split the cores into neighbours, as evenly as they go; each worker has at least one.

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


class Supervisor:
    """All fronts, and what they serve at the moment."""

    def __init__(
        self, plan: WorkerConfig, listener: socket.socket, metrics: Path, workers: int
    ) -> None:
        self.plan = plan
        self.listener = listener
        self.metrics = metrics
        self.stop = Shutdown(plan.drain_s)
        self.changing = asyncio.Lock()  # what is served; a front that starts must not miss it
        self.versions: dict[str, str] = {}
        usable = usable_cores()
        if workers > usable:
            log.warning(
                "%d workers share %d cores; more cores help, more workers do not", workers, usable
            )
        everything = affinity()
        # With a quota below its cores, what that lets run is shared out as well.
        share = max(1, usable // workers) if usable < len(everything) else usable
        self.fronts = [
            HTTPWorker(number, cores, min(len(cores), share), metrics)
            for number, cores in enumerate(shares(everything, workers))
        ]

    async def start(self) -> None:
        """Start all fronts; the first error is raised when none is left running."""
        reports = await asyncio.gather(
            *(front.start(self.plan, self.listener) for front in self.fronts)
        )
        for report in reports:
            if report.error is not None:
                await self.kill()
                kind = InputError if report.exit_code == InputError.exit_code else CheckFailedError
                raise kind(report.error)
        self.versions = reports[0].versions
        if any(report.versions != self.versions for report in reports):
            await self.kill()
            raise InputError(
                "a bundle's folder was changed while the workers opened it; start again."
            )

    async def kill(self) -> None:
        """End every front at once."""
        await asyncio.gather(*(front.close() for front in self.fronts))

    async def keep(self, front: HTTPWorker) -> None:
        """Replace one front whenever it dies, for as long as the server is to run."""
        loop = asyncio.get_running_loop()
        pause_s = 0.0
        began = loop.time()
        while True:
            pid = front.process.pid if front.process else 0
            status = await front.ended()
            multiprocess.mark_process_dead(pid, str(self.metrics))  # type: ignore[no-untyped-call]
            if self.stop.drain.is_set():
                return
            if loop.time() - began > LASTED_S:
                pause_s = 0.0
            log.error(
                "worker %d (pid %d) ended with %d; it is started again in %.1f s",
                front.number,
                pid,
                status,
                pause_s,
            )
            report = None
            while report is None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.stop.drain.wait(), pause_s)
                    return
                pause_s = min(max(2 * pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
                began = loop.time()
                report = await self._start_again(front)
            self._look(front, report)
            if self.stop.drain.is_set():  # it came to be after all others were told
                front.signal()

    async def _start_again(self, front: HTTPWorker) -> Report | None:
        """Start it with what is served by now; None where that is not to be, or cannot be yet."""
        async with self.changing:
            if self.stop.drain.is_set():
                return None
            try:
                return await front.start(self.plan, self.listener)
            except OSError as error:  # no memory, no process: the others serve on meanwhile
                log.error("worker %d cannot be started: %s", front.number, error)
                return None

    def _look(self, front: HTTPWorker, report: Report) -> None:
        if report.error is not None:
            log.error("worker %d does not start: %s", front.number, report.error)
        elif report.versions != self.versions:
            log.error(
                "worker %d serves other versions than the others, as a bundle's folder was "
                "changed and not loaded; send SIGHUP",
                front.number,
            )
        else:
            log.info("worker %d is back", front.number)

    def index(self) -> list[admin.Entry]:
        """Return every model's version; it is ready when one front is."""
        state = "READY" if any(front.ready for front in self.fronts) else "UNAVAILABLE"
        return [admin.Entry(name, version, state) for name, version in self.versions.items()]

    async def load(self, name: str, folder: Path | None = None) -> str:
        """Load a model in one front, and when that took it, in all; returns the version.

        ``InputError`` where the first refuses it, and nothing changed.
        """
        order = Load(name, None if folder is None else str(folder))
        async with self.changing:
            running = [front for front in self.fronts if front.ready]
            if not running:
                raise CheckFailedError("no worker is running; see the server's log.")
            report = await running[0].load(order)
            if report.error is not None:
                refused = report.exit_code == InputError.exit_code
                raise (InputError if refused else CheckFailedError)(report.error)
            if order.folder:  # for those that start later
                folders = self.plan.folders | {name: order.folder}
                self.plan = msgspec.structs.replace(self.plan, folders=folders)
            self.versions = report.versions
            others = await asyncio.gather(*(front.load(order) for front in running[1:]))
        failed = [
            one.error for one in others if one.error is not None or one.versions != self.versions
        ]
        if failed:
            raise CheckFailedError(
                f"{len(failed)} of {len(running)} workers still serve the old version of {name} "
                f"({failed[0] or 'the folder changed meanwhile'}); load it again."
            )
        return self.versions[name]

    async def load_all(self) -> None:
        """Load every model from its folder anew; one that is refused is logged."""
        for name in self.plan.folders:
            try:
                await self.load(name)
            except (InputError, CheckFailedError) as error:
                log.error("model %s: %s", name, error)

    async def end(self) -> None:
        """Have all fronts end, killing those that do not; a second signal is passed on too."""
        self.listener.close()  # else connections would wait for nobody once the fronts are gone
        for front in self.fronts:
            front.signal()
        ended = asyncio.gather(*(front.process.wait() for front in self.fronts if front.process))
        bound_s = self.plan.drain_s + self.plan.grace_s + EXIT_S
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(bound_s):
                await first(self.stop.now.wait(), asyncio.shield(ended))
        if not ended.done():
            for front in self.fronts:
                front.signal()
            await first(asyncio.sleep(1), asyncio.shield(ended))
        for front in self.fronts:
            if front.process and front.process.returncode is None:
                log.error("worker %d does not end and is killed", front.number)
                front.kill()
        await ended


async def supervise(
    plan: WorkerConfig,
    workers: int,
    listener: socket.socket,
    admin_listener: socket.socket | None,
    metrics: Path,
) -> int:
    """Start, keep and end the fronts; returns the exit code."""
    supervisor = Supervisor(plan, listener, metrics, workers)
    stop = supervisor.stop
    loads: set[asyncio.Task[None]] = set()

    def on_sighup() -> None:
        loads.add(asyncio.ensure_future(supervisor.load_all()))

    with stop.on_signals(on_sighup):
        try:
            await stop.unless(supervisor.start())
            if stop.drain.is_set():
                return 0
            async with asyncio.TaskGroup() as group:
                for front in supervisor.fronts:
                    group.create_task(supervisor.keep(front))
                if admin_listener:
                    listen(admin_listener)
                    app = admin.application(supervisor.index, supervisor.load, plan.token)
                    server = Server(app, admin_listener, plan.grace_s)
                    group.create_task(server.run_until(stop.drain, stop.now))
                announce(listener, admin_listener)
                await stop.drain.wait()
                await supervisor.end()
        finally:
            for load in loads:
                load.cancel()
            await asyncio.gather(*loads, return_exceptions=True)
            await supervisor.kill()
    return 1 if stop.now.is_set() else 0


def run(
    plan: WorkerConfig, workers: int, listener: socket.socket, admin_listener: socket.socket | None
) -> int:
    """Serve with several fronts, with the address on standard output once all are ready."""
    logging.config.dictConfig(log_config(plan.log_level))
    with tempfile.TemporaryDirectory(prefix="trainkit-metrics-") as metrics:
        return run_loop(supervise(plan, workers, listener, admin_listener, Path(metrics)))

"""One HTTP worker: the models of one process, its server, and its shutdown.

:func:`run` is all of ``trainkit serve`` with one worker. With several,
:mod:`trainkit.serve.http.supervisor` starts this module once for each. Such a worker inherits the
listening socket and a *control channel* of JSON lines: it reads its :class:`WorkerConfig`, then
each :class:`LoadOrder`; it writes a :class:`WorkerReport` for the start and for each order, and
empty lines as heartbeats of its event loop. When the channel closes the supervisor is gone, and it
exits too.
"""

import asyncio
import contextlib
import logging
import logging.config
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
import uvicorn

from trainkit.serve.errors import InputError, TrainkitError
from trainkit.serve.http import admin, traces
from trainkit.serve.http.app import application
from trainkit.serve.http.exceptions import UnavailableError
from trainkit.serve.http.logs import config as log_config
from trainkit.serve.http.model import Models
from trainkit.serve.http.settings import Settings
from trainkit.serve.http.sockets import DrainingServer, first, listen, url

Result = TypeVar("Result")

LINE_BYTES = 1 << 24  # maximum of one message: a path may be longer than asyncio's 64 KiB

log = logging.getLogger("trainkit.serve")


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker serves, and how it ends; times in seconds."""

    folders: dict[str, str]  # of the models, by name
    settings: Settings = Settings()
    token: str | None = None
    drain_s: float = 1.0  # it still accepts requests after SIGTERM, so that balancers notice
    grace_s: float = 30.0  # then for requests in progress
    log_level: str = "info"
    otel: bool = False
    cores: tuple[int, ...] = ()  # empty: all that the process may use
    listener: int = -1  # the inherited descriptor
    ping_s: float = 1.0  # between heartbeats
    silent_s: float = 10.0  # without one: killed; a worker on a busy machine is back before that


class LoadOrder(msgspec.Struct, frozen=True):
    """Load one model again; ``folder`` None is the folder it came from."""

    name: str
    folder: str | None = None


class WorkerReport(msgspec.Struct, frozen=True):
    """The result of the start or of a load: an error, or the versions now served, by name."""

    versions: dict[str, str] = {}
    error: str | None = None
    exit_code: int = 0


class Shutdown:
    """SIGTERM or SIGINT: the first sets ``drain``, the second ``now``."""

    def __init__(self, drain_s: float) -> None:
        self.drain = asyncio.Event()
        self.now = asyncio.Event()
        self.leave = asyncio.Event()  # drained long enough
        self.drain_s = drain_s
        self.on_sighup: Callable[[], object] = lambda: None

    def signal(self) -> None:
        """Take one signal."""
        (self.now if self.drain.is_set() else self.drain).set()

    async def wait(self) -> None:
        """Wait for the first signal and then for the time to drain, or for the second."""
        await self.drain.wait()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.now.wait(), self.drain_s)
        self.leave.set()

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Handle SIGTERM, SIGINT and SIGHUP in the block."""
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        for number in numbers[:2]:
            loop.add_signal_handler(number, self.signal)
        loop.add_signal_handler(signal.SIGHUP, lambda: self.on_sighup())
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    async def unless(self, work: Awaitable[Result]) -> Result | None:
        """Return the result of ``work``; None if the first signal came before: it is cancelled."""
        task = asyncio.ensure_future(work)
        await first(self.drain.wait(), asyncio.shield(task))
        if task.done():
            return task.result()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return None


class ModelReloader:
    """Loads new versions into the running models, one at a time."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self.turn = asyncio.Lock()
        self.tasks: set[asyncio.Task[None]] = set()

    def index(self) -> list[admin.Entry]:
        """Return every model's state."""
        return [
            admin.Entry(name, model.version, "READY" if model.ready else "UNAVAILABLE")
            for name, model in self.models.items()
        ]

    async def load(self, name: str, folder: Path | None = None) -> str:
        """Replace one model and return its version; ``InputError`` if the new one is invalid."""
        async with self.turn:
            model = await self.models.reload(name, folder)
        return model.version

    async def obey(self, order: LoadOrder) -> WorkerReport:
        """Load one model; an error is logged and reported, and the old version stays."""
        error, exit_code = None, 0
        try:
            await self.load(order.name, Path(order.folder) if order.folder else None)
        except Exception as refusal:
            error, exit_code = str(refusal) or type(refusal).__name__, 1
            if isinstance(refusal, TrainkitError):
                exit_code = refusal.exit_code
            expected = isinstance(refusal, TrainkitError | UnavailableError)
            message = "model %s: the new version is refused: %s"
            log.error(message, order.name, refusal, exc_info=None if expected else refusal)
        return WorkerReport(self.versions(), error, exit_code)

    def versions(self) -> dict[str, str]:
        """Return the version served under each name."""
        return {name: model.version for name, model in self.models.items()}

    def on_sighup(self) -> None:
        """Load every model from its folder again."""

        async def load_all() -> None:
            for name in list(self.models):
                await self.obey(LoadOrder(name))

        task = asyncio.ensure_future(load_all())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def close(self, grace_s: float) -> None:
        """Cancel loads, then drain and stop the models."""
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.models.close(grace_s)


class Control:
    """The worker's end of the control channel."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.orders: asyncio.Queue[LoadOrder] = asyncio.Queue()

    async def send(self, report: WorkerReport) -> None:
        """Answer the supervisor; ``listen`` notices if it is gone."""
        with contextlib.suppress(ConnectionError):
            self.writer.write(msgspec.json.encode(report) + b"\n")
            await self.writer.drain()

    async def beat(self, ping_s: float) -> None:
        """Send heartbeats."""
        while True:
            self.writer.write(b"\n")
            await asyncio.sleep(ping_s)

    async def listen(self, stop: Shutdown) -> None:
        """Queue orders until the supervisor is gone; then shut down."""
        decoder = msgspec.json.Decoder(LoadOrder)
        with contextlib.suppress(ConnectionError):
            while line := await self.reader.readline():
                self.orders.put_nowait(decoder.decode(line))
        log.error("the supervisor is gone; this worker ends")
        stop.drain_s = 0.0
        stop.drain.set()

    async def obey(self, reloader: ModelReloader) -> None:
        """Carry out orders, one after the other."""
        while True:
            await self.send(await reloader.obey(await self.orders.get()))


async def serve(
    config: WorkerConfig,
    stop: Shutdown,
    listener: socket.socket,
    admin_listener: socket.socket | None = None,
    control: Control | None = None,
) -> int:
    """Load, serve until a signal, shut down; returns the exit code."""
    with stop.signals():
        folders = {name: Path(folder) for name, folder in config.folders.items()}
        models = await stop.unless(Models.load(folders, config.settings))
        if models is None:
            return 0
        reloader = ModelReloader(models)
        stop.on_sighup = reloader.on_sighup
        try:
            draining = stop.drain.is_set
            app = application(
                models, config.settings, token=config.token, draining=draining, otel=config.otel
            )
            servers = [DrainingServer(app, listener, config.grace_s)]
            if admin_listener:
                admin_app = admin.application(reloader.index, reloader.load, config.token)
                servers.append(DrainingServer(admin_app, admin_listener, config.grace_s))
            for server in servers:
                listen(server.listener)
            async with asyncio.TaskGroup() as group:
                obeying = group.create_task(control.obey(reloader)) if control else None
                running = [
                    group.create_task(one.run_until(stop.leave, stop.now)) for one in servers
                ]
                if control:
                    await control.send(WorkerReport(reloader.versions()))
                else:
                    announce(listener, admin_listener)
                await stop.wait()
                await asyncio.wait(running)
                if obeying:
                    obeying.cancel()
        finally:
            await reloader.close(0.0 if stop.now.is_set() else config.grace_s)
    return 1 if stop.now.is_set() else 0


def run(config: WorkerConfig, listener: socket.socket, admin_listener: socket.socket | None) -> int:
    """Serve in this process; the address is printed once it is ready."""
    stop = Shutdown(config.drain_s)
    with traces.exported(config.otel):  # before logging is set up: it may raise InputError
        logging.config.dictConfig(log_config(config.log_level))
        return run_loop(serve(config, stop, listener, admin_listener))


def announce(listener: socket.socket, admin_listener: socket.socket | None) -> None:
    """Print the one line that says where to send requests."""
    at = f" admin: {url(admin_listener)}" if admin_listener else ""
    print(f"ready: {url(listener)}{at}", flush=True)


def run_loop(main: Awaitable[Result]) -> Result:
    """Run a coroutine to its end, on uvloop if it is installed."""
    factory = uvicorn.Config(app="", loop="auto", log_config=None).get_loop_factory()
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)  # type: ignore[arg-type]  # ours are coroutines


async def serve_supervised(channel: socket.socket) -> int:
    """Serve as one worker of several."""
    control = Control(*await asyncio.open_connection(sock=channel, limit=LINE_BYTES))
    config = msgspec.json.decode(await control.reader.readline(), type=WorkerConfig)
    logging.config.dictConfig(log_config(config.log_level))
    if config.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, config.cores)  # before there are threads, which inherit it
    stop = Shutdown(config.drain_s)
    tasks = {
        asyncio.ensure_future(control.listen(stop)),
        asyncio.ensure_future(control.beat(config.ping_s)),
    }
    try:
        with socket.socket(fileno=config.listener) as listener, traces.exported(config.otel):
            return await serve(config, stop, listener, control=control)
    except InputError as error:
        await control.send(WorkerReport(error=str(error), exit_code=error.exit_code))
        return error.exit_code
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        control.writer.close()
        with contextlib.suppress(ConnectionError):
            await control.writer.wait_closed()


if __name__ == "__main__":
    sys.exit(run_loop(serve_supervised(socket.socket(fileno=int(sys.argv[1])))))

"""One front: the models of one process, its server, and its end.

:func:`run` is the whole of ``trainkit serve`` with one worker. With several,
:mod:`trainkit.serve.http.supervisor` starts this module once for each. A front then inherits the
listening socket and one more, the *control channel*: JSON lines, first the :class:`WorkerConfig`,
then orders to :class:`Load`; the start and each order are answered by one :class:`Report`. A
:class:`Ping` may come at any time, and the event loop answers it with a :class:`Pong`. When the
channel ends the supervisor is gone, and the front goes too.
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
from typing import TypeAlias, TypeVar

import msgspec
import uvicorn

from trainkit.serve.errors import InputError, TrainkitError
from trainkit.serve.http import admin, traces
from trainkit.serve.http.app import application
from trainkit.serve.http.exceptions import UnavailableError
from trainkit.serve.http.logs import config as log_config
from trainkit.serve.http.model import Models
from trainkit.serve.http.settings import Settings
from trainkit.serve.http.sockets import Server, first, listen, url

__all__ = [
    "LINE_BYTES",
    "FromFront",
    "Load",
    "ModelReloader",
    "Ping",
    "Pong",
    "Report",
    "Shutdown",
    "ToFront",
    "WorkerConfig",
    "announce",
    "run",
    "run_loop",
]

Result = TypeVar("Result")

LINE_BYTES = 1 << 24  # of one message at most: a folder's path may be longer than asyncio's 64 KiB

log = logging.getLogger("trainkit.serve")


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a front serves, and how it ends."""

    folders: dict[str, str]  # of the models, by name
    settings: Settings = Settings()
    token: str | None = None
    drain_s: float = 1.0  # served on after the signal to end, so that balancers notice
    grace_s: float = 30.0  # then, at most, for what is in flight
    log_level: str = "info"
    otel: bool = False
    cores: tuple[int, ...] = ()  # empty: whatever the process may use
    listener: int = -1  # the inherited descriptor


class Load(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Load one model anew; ``folder`` None is the one it came from."""

    name: str
    folder: str | None = None


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Asks for a ``Pong``, also while models load and while requests drain."""


class Report(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """What became of the start or of a load: an error, or the versions now served, by name."""

    versions: dict[str, str] = {}
    error: str | None = None
    exit_code: int = 0


class Pong(msgspec.Struct, frozen=True, tag=True):
    """Answers a ``Ping``."""


ToFront: TypeAlias = Load | Ping  # after the WorkerConfig
FromFront: TypeAlias = Report | Pong


class Shutdown:
    """SIGTERM or SIGINT: ``drain`` is set by the first, ``now`` by the second."""

    def __init__(self, drain_s: float) -> None:
        self.drain = asyncio.Event()
        self.now = asyncio.Event()
        self.leave = asyncio.Event()  # drained long enough
        self.drain_s = drain_s

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
    def on_signals(self, on_sighup: Callable[[], None]) -> Iterator[None]:
        """Handle SIGTERM, SIGINT and SIGHUP in the block."""
        loop = asyncio.get_running_loop()
        handlers = {
            signal.SIGTERM: self.signal,
            signal.SIGINT: self.signal,
            signal.SIGHUP: on_sighup,
        }
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)

    async def unless(self, work: Awaitable[Result]) -> Result | None:
        """Return what ``work`` gives, or None where the first signal came before; it is undone."""
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
        """Swap one model for a new version, which is returned; ``InputError`` where refused."""
        async with self.turn:
            model = await self.models.reload(name, folder)
        return model.version

    async def load_all(self) -> None:
        """Load every model from its folder anew; one that is refused is logged."""
        for name in list(self.models):
            try:
                await self.load(name)
            except Exception as error:  # whatever it is, the old version is served on
                log_refused(name, error)

    def on_sighup(self) -> None:
        """Take SIGHUP."""
        task = asyncio.ensure_future(self.load_all())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def close(self, grace_s: float) -> None:
        """Give up what is being loaded, then drain and stop the models."""
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.models.close(grace_s)


class Control:
    """The front's end of the control channel."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.orders: asyncio.Queue[Load] = asyncio.Queue()

    async def say(self, message: FromFront) -> None:
        """Answer the supervisor; whether it is gone is for ``listen`` to see."""
        with contextlib.suppress(ConnectionError):
            self.writer.write(msgspec.json.encode(message) + b"\n")
            await self.writer.drain()

    async def listen(self, stop: Shutdown) -> None:
        """Answer pings at once and keep orders, until the supervisor is gone; then end."""
        decoder = msgspec.json.Decoder(ToFront)
        with contextlib.suppress(ConnectionError):
            while line := await self.reader.readline():
                order = decoder.decode(line)
                if isinstance(order, Ping):
                    await self.say(Pong())
                else:
                    self.orders.put_nowait(order)
        log.error("the supervisor is gone; this front ends")
        stop.drain_s = 0.0
        stop.drain.set()

    async def obey(self, loader: ModelReloader) -> None:
        """Do what the supervisor orders, one order after the other."""
        while True:
            order = await self.orders.get()
            try:
                await loader.load(order.name, Path(order.folder) if order.folder else None)
            except Exception as error:  # whatever it is, the old version is served on
                log_refused(order.name, error)
                exit_code = error.exit_code if isinstance(error, TrainkitError) else 1
                said = str(error) or type(error).__name__
                await self.say(Report(versions(loader.models), said, exit_code))
            else:
                await self.say(Report(versions(loader.models)))


def log_refused(name: str, error: Exception) -> None:
    """Say why a new version is not served; with the traceback where nobody expected the error."""
    unexpected = None if isinstance(error, TrainkitError | UnavailableError) else error
    log.error("model %s: the new version is refused: %s", name, error, exc_info=unexpected)


def versions(models: Models) -> dict[str, str]:
    """Return the version served under each name."""
    return {name: model.version for name, model in models.items()}


async def serve(
    plan: WorkerConfig,
    stop: Shutdown,
    listener: socket.socket,
    ready: Callable[[Models], Awaitable[None]],
    admin_listener: socket.socket | None = None,
    control: Control | None = None,
) -> int:
    """Load, serve until told to end, end; returns the exit code. ``ready`` is awaited once."""
    loaders: list[ModelReloader] = []  # none before the models are loaded

    def on_sighup() -> None:
        for one in loaders:
            one.on_sighup()

    with stop.on_signals(on_sighup):
        folders = {name: Path(folder) for name, folder in plan.folders.items()}
        models = await stop.unless(Models.load(folders, plan.settings))
        if models is None:
            return 0
        loader = ModelReloader(models)
        loaders.append(loader)
        try:
            app = application(
                models, plan.settings, token=plan.token, draining=stop.drain.is_set, otel=plan.otel
            )
            servers = [Server(app, listener, plan.grace_s)]
            if admin_listener:
                admin_app = admin.application(loader.index, loader.load, plan.token)
                servers.append(Server(admin_app, admin_listener, plan.grace_s))
            for server in servers:
                listen(server.listener)
            async with asyncio.TaskGroup() as group:
                obeying = group.create_task(control.obey(loader)) if control else None
                running = [
                    group.create_task(one.run_until(stop.leave, stop.now)) for one in servers
                ]
                await ready(models)
                await stop.wait()
                await asyncio.wait(running)
                if obeying:
                    obeying.cancel()
        finally:
            await loader.close(0.0 if stop.now.is_set() else plan.grace_s)
    return 1 if stop.now.is_set() else 0


def run(plan: WorkerConfig, listener: socket.socket, admin_listener: socket.socket | None) -> int:
    """Serve in this process, with the address on standard output once ready."""

    async def ready(models: Models) -> None:
        announce(listener, admin_listener)

    stop = Shutdown(plan.drain_s)
    with traces.exported(plan.otel):  # refused before the logs are this server's
        logging.config.dictConfig(log_config(plan.log_level))
        return run_loop(serve(plan, stop, listener, ready, admin_listener))


def announce(listener: socket.socket, admin_listener: socket.socket | None) -> None:
    """Print the one line that says where to send requests."""
    at = f" admin: {url(admin_listener)}" if admin_listener else ""
    print(f"ready: {url(listener)}{at}", flush=True)


def run_loop(main: Awaitable[Result]) -> Result:
    """Run a coroutine to its end, on uvloop where it is installed."""
    factory = uvicorn.Config(app="", loop="auto", log_config=None).get_loop_factory()
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)  # type: ignore[arg-type]  # ours are coroutines


async def serve_supervised(channel: socket.socket) -> int:
    """Serve as one front of several."""
    control = Control(*await asyncio.open_connection(sock=channel, limit=LINE_BYTES))
    plan = msgspec.json.decode(await control.reader.readline(), type=WorkerConfig)
    logging.config.dictConfig(log_config(plan.log_level))
    if plan.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, plan.cores)  # before there are threads; they inherit it

    async def ready(models: Models) -> None:
        await control.say(Report(versions(models)))

    stop = Shutdown(plan.drain_s)
    listening = asyncio.ensure_future(control.listen(stop))
    try:
        with socket.socket(fileno=plan.listener) as listener, traces.exported(plan.otel):
            return await serve(plan, stop, listener, ready, control=control)
    except InputError as error:
        await control.say(Report(error=str(error), exit_code=error.exit_code))
        return error.exit_code
    finally:
        listening.cancel()
        await asyncio.wait({listening})
        control.writer.close()
        with contextlib.suppress(ConnectionError):
            await control.writer.wait_closed()


if __name__ == "__main__":
    sys.exit(run_loop(serve_supervised(socket.socket(fileno=int(sys.argv[1])))))

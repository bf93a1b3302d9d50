"""One inference process from this end: started, asked over its sockets, and ended.

Out of a :class:`ProcessSpec` comes a process with its model loaded; batches of rows go in over one
socket, pings over another, and what becomes of either is an answer or ``LostError``.
"""

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from trainkit.serve.encoding import Tokens
from trainkit.serve.errors import InputError
from trainkit.serve.files import FileInfo
from trainkit.serve.http.connections import Batches, LostError, Pings
from trainkit.serve.http.worker import Failed, Logits, Order, ragged

__all__ = ["PROGRAM", "InferenceProcess", "LostError", "ProcessSpec"]

# -P: a file of the working directory must not stand in for a library.
PROGRAM = (sys.executable, "-P", "-m", "trainkit.serve.http.worker")
LATE_S = 0.05


class ProcessSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What to run and how. ``return_s``: a batch waits so long for a new process."""

    model: Path
    files: dict[str, FileInfo] = {}
    """Where its weights lie beside it, which a descriptor cannot name: both are opened by their
    paths then, if they are still these."""
    pad_id: int
    token_types: bool
    threads: int
    providers: tuple[str, ...]
    start_s: float
    hang_s: float
    return_s: float
    program: tuple[str, ...] = PROGRAM


class InferenceProcess:
    """One process and this end of its sockets; it is ended when they close."""

    def __init__(self, launch: ProcessSpec, popen: subprocess.Popen[bytes]) -> None:
        self.reason: str | None = None  # why it was ended from here
        self._launch = launch
        self._popen = popen
        self._batches = Batches()
        self._pings = Pings()
        self._number = 0

    @classmethod
    async def start(cls, launch: ProcessSpec, file: int | None) -> "InferenceProcess":
        """Start one and wait until its model is loaded; ``InputError`` where it does not load.

        The model is read from the open descriptor ``file``; None: from its path.
        """
        popen, sockets = _spawn(launch, file)
        process = cls(launch, popen)
        try:
            await process._connect(sockets)
            if await process._loads():
                return process
        except BaseException:
            await process.end()
            for ours in sockets:
                ours.close()  # where it came to no connection
            raise
        await process.end()
        raise InputError(
            f"{launch.model}: the inference process ended while it loaded the model "
            f"({process.ended()}); look at its messages, and whether there is enough memory."
        )

    async def _connect(self, sockets: tuple[socket.socket, socket.socket]) -> None:
        loop = asyncio.get_running_loop()
        batches, pings = sockets
        await loop.create_unix_connection(lambda: self._batches, sock=batches)
        await loop.create_unix_connection(lambda: self._pings, sock=pings)

    async def _loads(self) -> bool:
        """Tell whether it loads its model; False: it ended. ``InputError`` where it refuses."""
        started, start_s = self._batches.started, self._launch.start_s
        await _first(started, self.lost, timeout_s=start_s)
        if started.done():
            started.result()
        elif not self.lost.done():
            raise InputError(
                f"{self._launch.model} was not loaded in {start_s:g} s; give it more time, or a "
                "smaller model."
            )
        return started.done()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._popen.pid

    @property
    def lost(self) -> asyncio.Future[None]:
        """Done when the process is gone, or its socket."""
        return self._batches.lost

    @property
    def alive(self) -> bool:
        """Whether a batch may be given to it; not where it was killed a moment ago."""
        return self.reason is None and not self.lost.done()

    @property
    def has_answered(self) -> bool:
        """Whether it came to the end of a batch."""
        return self._batches.has_answered

    def ping(self) -> None:
        """Send it a ping; see ``answers_ping``."""
        self._pings.send()

    async def answers_ping(self, within_s: float) -> bool:
        """Tell whether it answers the last ping in time."""
        await _first(self._pings.answered, self.lost, timeout_s=within_s)
        return self._pings.answered.done()

    async def run(self, rows: Sequence[Tokens]) -> Logits | Failed:
        """Run one batch; ``LostError`` where the process ends, also because it took too long."""
        if self.lost.done():
            raise LostError
        loop = asyncio.get_running_loop()
        hang_s = self._launch.hang_s
        number = self._number = self._number + 1
        answer = self._batches.send(ragged(number, rows, token_types=self._launch.token_types))

        def give_up() -> None:
            if not answer.done():
                self.kill(f"a batch took longer than {hang_s:g} s")

        # Not at once: after a stall of this process, what had come in meanwhile is read first.
        timer = loop.call_later(hang_s, loop.call_later, LATE_S, give_up)
        try:
            return await answer
        finally:
            timer.cancel()
            self._batches.forget(number)

    def kill(self, reason: str) -> None:
        """End it, in whatever state it is; ``lost`` follows."""
        if not self.lost.done():
            self.reason = reason
            self._popen.kill()

    async def end(self) -> None:
        """Leave neither a process nor a zombie nor an open socket."""
        self._popen.kill()
        await asyncio.to_thread(self._popen.wait)
        self._pings.close()
        await self._batches.close()

    def ended(self) -> str:
        """Say how it ended, after ``end``."""
        code = self._popen.returncode
        exit_ = f"signal {-code}, {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{self.reason}; {exit_}" if self.reason else exit_


def _spawn(
    launch: ProcessSpec, file: int | None
) -> tuple[subprocess.Popen[bytes], tuple[socket.socket, socket.socket]]:
    """Start a process, and return our ends of its sockets, for batches and for pings.

    It inherits the cores that this one may use.
    """
    ours, theirs = socket.socketpair()
    our_pings, their_pings = socket.socketpair()
    order = Order(
        socket=theirs.fileno(),
        pings=their_pings.fileno(),
        model=str(launch.model),
        file=file,
        files=launch.files,
        threads=launch.threads,
        providers=launch.providers,
        pad_id=launch.pad_id,
    )
    command = [*launch.program, msgspec.json.encode(order).decode()]
    inherited = [order.socket, order.pings, *([] if order.file is None else [order.file])]
    try:
        popen = subprocess.Popen(command, pass_fds=inherited, stdin=subprocess.DEVNULL)
    except OSError:
        ours.close()
        our_pings.close()
        raise
    finally:
        theirs.close()
        their_pings.close()
    return popen, (ours, our_pings)


async def _first(*futures: asyncio.Future[Any], timeout_s: float) -> None:
    """Wait until one of them is done, or the time is over; look at them to see which.

    After a stall of this process too, what had come in meanwhile is seen before the time is.
    """
    await asyncio.wait(futures, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)

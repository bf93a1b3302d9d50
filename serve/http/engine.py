"""The inference process as its front sees it: started, watched, ended, and started again.

The process holds the ONNX session, so that a crash or a hang of native code takes no request with
it: what was in flight runs again in the next process. Rows of tokens go in, logits come out.
"""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np

from trainkit.serve.decision import FloatArray
from trainkit.serve.encoding import Tokens
from trainkit.serve.errors import InputError
from trainkit.serve.http.failures import InferenceError, UnavailableError
from trainkit.serve.http.worker import (
    LENGTH,
    Failed,
    FromWorker,
    Logits,
    Order,
    Ready,
    Refused,
    Run,
    frame,
    ragged,
)

__all__ = ["Engine", "Launch"]

logger = logging.getLogger("trainkit.serve")

# -P: a file of the working directory must not stand in for a library.
PROGRAM = (sys.executable, "-P", "-m", "trainkit.serve.http.worker")
PING_S = 0.4
PONG_S = 0.5  # no answer for so long: not ready, which is so within a second of any stop
KILL_S = 2.0  # and for so long: ended. A machine short of cores comes back before that
LATE_S = 0.05
PAUSES_S = (0.1, 5.0)  # between restarts that follow each other; the first comes at once
TRIES = 2  # a batch whose process ends is run again: it may not have been the batch's doing


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """What to run and how. ``return_s``: a batch waits so long for a new process."""

    model: Path
    by_path: bool = False  # its weights lie beside it, which a descriptor cannot name
    pad_id: int
    token_types: bool
    threads: int
    providers: tuple[str, ...]
    start_s: float
    hang_s: float
    return_s: float
    program: tuple[str, ...] = PROGRAM


class _LostError(Exception):
    """The process ended before it answered."""


class _Pings(asyncio.Protocol):
    """A socket to the process on which a thread sends back what comes."""

    def __init__(self) -> None:
        self.answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        _settle(self.answered)

    def send(self) -> None:
        """Send one; ``answered`` is done when it is back."""
        assert self._transport is not None
        self.answered = asyncio.get_running_loop().create_future()
        if not self._transport.is_closing():
            self._transport.write(b"?")

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class _Process(asyncio.Protocol):
    """One process and this end of its socket; it is ended when the socket closes."""

    def __init__(self, popen: subprocess.Popen[bytes], pings: "_Pings") -> None:
        loop = asyncio.get_running_loop()
        self.popen = popen
        self.pings = pings
        self.started: asyncio.Future[None] = loop.create_future()
        self.lost: asyncio.Future[None] = loop.create_future()
        self.reason: str | None = None  # why it was ended from here
        self.has_answered = False
        self._answers: dict[int, asyncio.Future[Logits | Failed]] = {}
        self._received = bytearray()
        self._decoder = msgspec.msgpack.Decoder(FromWorker)
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        start = 0
        while len(self._received) >= start + LENGTH.size:
            begin = start + LENGTH.size
            end = begin + LENGTH.unpack_from(self._received, start)[0]
            if len(self._received) < end:
                break
            self._take(self._decoder.decode(self._received[begin:end]))
            start = end
        del self._received[:start]

    def _take(self, message: FromWorker) -> None:
        if isinstance(message, Ready):
            _settle(self.started)
        elif isinstance(message, Refused):
            if not self.started.done():
                self.started.set_exception(InputError(message.sentence))
        else:
            self.has_answered = True
            answer = self._answers.pop(message.number, None)
            if answer is not None and not answer.done():  # else nobody waits for it any more
                answer.set_result(message)

    def connection_lost(self, exc: Exception | None) -> None:
        _settle(self.lost)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(_LostError())

    def send(self, message: Run) -> None:
        assert self._transport is not None
        if not self.lost.done():
            self._transport.write(frame(message))

    async def answers_ping(self, within_s: float) -> bool:
        """Tell whether it answers the last ping in time."""
        await _first(self.pings.answered, self.lost, timeout_s=within_s)
        return self.pings.answered.done()

    async def run(
        self, number: int, rows: Sequence[Tokens], hang_s: float, *, token_types: bool
    ) -> Logits | Failed:
        """Run one batch; ``_LostError`` where the process ends, also because it took too long."""
        if self.lost.done():
            raise _LostError
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Logits | Failed] = loop.create_future()
        self._answers[number] = answer
        self.send(ragged(number, rows, token_types=token_types))

        def give_up() -> None:
            if not answer.done():
                self.kill(f"a batch took longer than {hang_s:g} s")

        # Not at once: after a stall of this process, what had come in meanwhile is read first.
        timer = loop.call_later(hang_s, loop.call_later, LATE_S, give_up)
        try:
            return await answer
        finally:
            timer.cancel()
            self._answers.pop(number, None)

    def kill(self, reason: str) -> None:
        """End it, in whatever state it is; ``lost`` follows."""
        if not self.lost.done():
            self.reason = reason
            self.popen.kill()

    async def end(self) -> None:
        """Leave neither a process nor a zombie nor an open socket."""
        self.popen.kill()
        await asyncio.to_thread(self.popen.wait)
        self.pings.close()
        if self._transport is not None:
            self._transport.abort()
            await self.lost
        if self.started.done() and not self.started.cancelled():
            self.started.exception()  # was seen, or nobody waits for it

    def ended(self) -> str:
        """Say how it ended, after ``end``."""
        code = self.popen.returncode
        exit_ = f"signal {-code}, {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{self.reason}; {exit_}" if self.reason else exit_


async def _first(*futures: asyncio.Future[Any], timeout_s: float) -> None:
    """Wait until one of them is done, or the time is over; look at them to see which.

    After a stall of this process too, what had come in meanwhile is seen before the time is.
    """
    await asyncio.wait(futures, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Engine:
    """One inference process at a time, whatever becomes of it.

    Between ``start`` and ``close`` there is a process, or a new one is being started.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.restarts = 0
        try:
            self._file = None if launch.by_path else os.open(launch.model, os.O_RDONLY)
        except OSError as error:
            raise InputError(f"{launch.model} cannot be read ({error.strerror}).") from None
        self._turn = asyncio.Lock()
        self._up = asyncio.Event()
        self._process: _Process | None = None
        self._responsive = False
        self._keeper: asyncio.Task[None] | None = None
        self._closed = False
        self._number = 0

    async def start(self) -> None:
        """Start the process and wait for its model; ``InputError`` where it does not load."""
        self._adopt(await self._open())
        self._keeper = asyncio.create_task(self._keep())

    @property
    def ready(self) -> bool:
        """Whether there is a process, with its model loaded, that answers pings."""
        return self._alive() is not None and self._responsive

    @property
    def pid(self) -> int | None:
        """The process id; None while there is no process."""
        process = self._alive()
        return None if process is None else process.popen.pid

    async def run(self, rows: Sequence[Tokens]) -> FloatArray:
        """Return the logits of one batch, (B, C); batches run one after the other.

        ``InferenceError`` where the session refuses the batch, or the process ends or hangs on it
        twice; ``UnavailableError`` where no new process comes, or the engine is closed.
        """
        how = ""
        async with self._turn:
            for _ in range(TRIES):
                process = await self._available()
                self._number += 1
                try:
                    answer = await process.run(
                        self._number,
                        rows,
                        self.launch.hang_s,
                        token_types=self.launch.token_types,
                    )
                except _LostError:
                    how = process.reason or "it ended"
                    continue
                if isinstance(answer, Failed):
                    raise InferenceError(answer.sentence)
                return np.frombuffer(answer.values, dtype=np.float32).reshape(answer.shape)
        raise InferenceError(f"the inference process was lost on it {TRIES} times: {how}")

    async def close(self) -> None:
        """End the process; a batch that still runs gets ``UnavailableError``."""
        self._closed = True
        self._up.set()
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
        if self._process is not None:
            await self._process.end()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _alive(self) -> _Process | None:
        process = self._process
        # One that was killed a moment ago may still look alive.
        gone = process is None or process.lost.done() or process.reason is not None
        return None if gone else process

    async def _available(self) -> _Process:
        while not self._closed:
            process = self._alive()
            if process is not None:
                return process
            self._up.clear()  # until the keeper has a new one
            try:
                await asyncio.wait_for(self._up.wait(), self.launch.return_s)
            except TimeoutError:
                raise UnavailableError(
                    f"the inference process did not come back in {self.launch.return_s:g} s"
                ) from None
        raise UnavailableError("the model is stopped")

    def _adopt(self, process: _Process) -> None:
        self._process = process
        self._responsive = True
        self._up.set()

    async def _open(self) -> _Process:
        """Start a process and wait until its model is loaded."""
        process, ours, pings = self._spawn()
        loop = asyncio.get_running_loop()
        try:
            await loop.create_unix_connection(lambda: process, sock=ours)
            await loop.create_unix_connection(lambda: process.pings, sock=pings)
            await _first(process.started, process.lost, timeout_s=self.launch.start_s)
            if process.started.done():
                process.started.result()
                return process
            if not process.lost.done():
                raise InputError(
                    f"{self.launch.model} was not loaded in {self.launch.start_s:g} s; give it "
                    "more time, or a smaller model."
                )
        except BaseException:
            await process.end()
            ours.close()  # where it came to no connection
            pings.close()
            raise
        await process.end()
        raise InputError(
            f"{self.launch.model}: the inference process ended while it loaded the model "
            f"({process.ended()}); look at its messages, and whether there is enough memory."
        )

    def _spawn(self) -> tuple[_Process, socket.socket, socket.socket]:
        """Start a process, and return our ends of its sockets, for batches and for pings.

        It inherits the cores that this one may use.
        """
        launch = self.launch
        ours, theirs = socket.socketpair()
        our_pings, their_pings = socket.socketpair()
        order = Order(
            socket=theirs.fileno(),
            pings=their_pings.fileno(),
            model=str(launch.model),
            file=self._file,
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
        return _Process(popen, _Pings()), ours, our_pings

    async def _keep(self) -> None:
        """Watch the process; when it is lost start another, for ever, with growing pauses."""
        pause_s = 0.0
        while True:
            process = self._process
            assert process is not None
            await self._watch(process)
            lost_at = asyncio.get_running_loop().time()
            await process.end()
            if process.has_answered:
                pause_s = 0.0
            self._process = None
            while self._process is None:
                await asyncio.sleep(pause_s)
                pause_s = min(max(2 * pause_s, PAUSES_S[0]), PAUSES_S[1])
                try:
                    self._adopt(await self._open())
                except (InputError, OSError) as error:
                    logger.error("%s; trying again in %.1f s", error, pause_s)
            self.restarts += 1
            logger.warning(
                "the inference process of %s was lost (%s); restart %d took %.1f s",
                self.launch.model,
                process.ended(),
                self.restarts,
                asyncio.get_running_loop().time() - lost_at,
            )

    async def _watch(self, process: _Process) -> None:
        """Return when the process is lost; one that does not answer is ended."""
        while not process.lost.done():
            process.pings.send()
            self._responsive = await process.answers_ping(PONG_S)
            if not self._responsive and not await process.answers_ping(KILL_S - PONG_S):
                process.kill(f"it did not answer for {KILL_S:g} s")
                await process.lost
            self._responsive = not process.lost.done()
            await asyncio.wait({process.lost}, timeout=PING_S)

"""A model in a process of its own, which is watched, killed if it hangs, and started again.

The process holds the ONNX session, so that a crash or a hang of native code loses no request: the
batch in progress runs again in the next process. :class:`ModelProcess` takes rows of tokens and
returns logits; its process runs :mod:`trainkit.serve.http.model_worker`.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
from collections import deque
from collections.abc import Sequence
from typing import cast

import msgspec
import numpy as np

from trainkit.serve.encoding import Tokens
from trainkit.serve.errors import InputError
from trainkit.serve.http.exceptions import InferenceError, UnavailableError
from trainkit.serve.http.model_worker import LENGTH, ProcessSpec, Reply, RowBatch, frame
from trainkit.serve.types import FloatArray

logger = logging.getLogger("trainkit.serve")

DECODER = msgspec.msgpack.Decoder(Reply)
LATE_S = 0.05
TRIES = 2  # a batch whose process dies runs again: it need not be the cause


class LostError(Exception):
    """The process ended before it replied."""


class ModelProcess:
    """One process at a time; between ``start`` and ``close`` there is one or it is being started.

    ``restarts`` counts how often it was replaced.
    """

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self.restarts = 0
        try:
            self._file = None if spec.files else os.open(spec.model, os.O_RDONLY)
        except OSError as error:
            raise InputError(f"{spec.model} cannot be read ({error.strerror}).") from None
        self._turn = asyncio.Lock()
        self._started = asyncio.Event()
        self._process: _Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._closed = False

    async def start(self) -> None:
        """Start the process and wait for its model; ``InputError`` if it does not load."""
        self._process = await _Process.start(self.spec, self._file)
        self._keeper = asyncio.create_task(self._keep(self._process))

    @property
    def ready(self) -> bool:
        """Whether the model is loaded and the process sends heartbeats."""
        process = self._alive()
        return process is not None and process.silent_s < self.spec.silent_s

    @property
    def pid(self) -> int | None:
        """The process id; None while there is no process."""
        process = self._alive()
        return None if process is None else process.popen.pid

    async def run(self, rows: Sequence[Tokens]) -> FloatArray:
        """Return the logits of one batch, (B, C); batches run one after the other.

        Raises ``InferenceError`` if the session rejects the batch or the process dies or hangs on
        it twice, ``UnavailableError`` if no new process starts in time or this is closed.
        """
        reason = ""
        batch = RowBatch.of(rows, token_types=self.spec.token_types)
        async with self._turn:
            for _ in range(TRIES):
                process = await self._available()
                try:
                    reply = await process.run(batch)
                except LostError:
                    reason = process.reason or "it ended"
                    continue
                if reply.error:
                    raise InferenceError(reply.error)
                return np.frombuffer(reply.values, dtype=np.float32).reshape(reply.shape)
        raise InferenceError(f"the model process was lost on it {TRIES} times: {reason}")

    async def close(self) -> None:
        """End the process; a batch in progress gets ``UnavailableError``."""
        self._closed = True
        self._started.set()
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
        if self._process is not None:
            await self._process.end()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _alive(self) -> "_Process | None":
        process = self._process
        return process if process is not None and process.alive else None

    async def _available(self) -> "_Process":
        while not self._closed:
            process = self._alive()
            if process is not None:
                return process
            self._started.clear()
            try:
                await asyncio.wait_for(self._started.wait(), self.spec.return_s)
            except TimeoutError:
                raise UnavailableError(
                    f"the model process did not come back in {self.spec.return_s:g} s"
                ) from None
        raise UnavailableError("the model is stopped")

    async def _keep(self, process: "_Process") -> None:
        """Replace the process whenever it is lost, with growing pauses."""
        clock = asyncio.get_running_loop().time
        pause_s = 0.0
        while True:
            await process.watch()
            lost_at = clock()
            await process.end()
            ended = process.ended()
            if process.has_replied:
                pause_s = 0.0
            self._process = None
            while self._process is None:
                await asyncio.sleep(pause_s)
                shortest, longest = self.spec.pauses_s
                pause_s = min(max(2 * pause_s, shortest), longest)
                try:
                    self._process = process = await _Process.start(self.spec, self._file)
                except (InputError, OSError) as error:
                    logger.error("%s; trying again in %.1f s", error, pause_s)
            self._started.set()
            self.restarts += 1
            logger.warning(
                "the model process of %s was lost (%s); restart %d took %.1f s",
                self.spec.model,
                ended,
                self.restarts,
                clock() - lost_at,
            )


class _Process(asyncio.Protocol):
    """One started process and this end of its two sockets."""

    def __init__(self, spec: ProcessSpec, file: int | None) -> None:
        self.spec = spec
        self.reason: str | None = None  # why it was killed from here
        self.has_replied = False  # to a batch
        self.silent_s = 0.0  # since the last heartbeat, while this process was awake
        loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[None] = loop.create_future()
        self._loaded: asyncio.Future[Reply] = loop.create_future()
        self._replies = deque([self._loaded])  # in the order of the batches
        self._received = bytearray()
        self._transport: asyncio.WriteTransport | None = None
        batches, their_batches = socket.socketpair()
        heartbeat, their_heartbeat = socket.socketpair()
        inherited = [their_batches.fileno(), their_heartbeat.fileno()]
        inherited += [] if file is None else [file]
        self._batches, self._heartbeat = batches, heartbeat
        heartbeat.setblocking(False)
        with their_batches, their_heartbeat:
            try:
                self.popen = subprocess.Popen(
                    [*spec.program, msgspec.json.encode(spec).decode(), *map(str, inherited)],
                    pass_fds=inherited,
                    stdin=subprocess.DEVNULL,
                )
            except OSError:
                batches.close()
                heartbeat.close()
                raise

    @classmethod
    async def start(cls, spec: ProcessSpec, file: int | None) -> "_Process":
        """Start one and wait until its model is loaded; ``InputError`` if it does not load.

        The model is read from the open descriptor ``file``; None: from its path.
        """
        process = cls(spec, file)
        try:
            await process._connect()
            await process._load()
        except BaseException:
            await process.end()
            raise
        return process

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: self, sock=self._batches)
        loop.add_reader(self._heartbeat, self._on_heartbeat)

    async def _load(self) -> None:
        model, start_s = self.spec.model, self.spec.start_s
        await asyncio.wait({self._loaded}, timeout=start_s)
        if not self._loaded.done():
            self._loaded.cancel()
            raise InputError(
                f"{model} was not loaded in {start_s:g} s; allow more time, or use a smaller model."
            )
        try:
            reply = self._loaded.result()
        except LostError:
            await asyncio.to_thread(self.popen.wait)
            raise InputError(
                f"{model}: the model process ended while it loaded the model "
                f"({self.ended()}); look at its messages, and whether there is enough memory."
            ) from None
        if reply.error:
            raise InputError(reply.error)

    # asyncio's streams would cost two more turns of the event loop per batch.
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport; uvloop's are not subclasses of asyncio's."""
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        """Give each reply to the batch that waits for it."""
        self._received += data
        while len(self._received) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(self._received)[0]
            if len(self._received) < end:
                return
            reply = DECODER.decode(self._received[LENGTH.size : end])
            del self._received[:end]
            waiting = self._replies.popleft()
            self.has_replied |= waiting is not self._loaded
            if not waiting.done():  # its caller may be gone
                waiting.set_result(reply)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail every batch that waits."""
        self.lost.set_result(None)
        for waiting in self._replies:
            if not waiting.done():
                waiting.set_exception(LostError())

    def _on_heartbeat(self) -> None:
        with contextlib.suppress(OSError):
            try:
                received = self._heartbeat.recv(1024)
            except BlockingIOError:  # woken with nothing to read: the next one is waited for
                return
            if received:
                self.silent_s = 0.0
                return
        asyncio.get_running_loop().remove_reader(self._heartbeat)

    @property
    def alive(self) -> bool:
        """Whether it takes batches; not after it was killed."""
        return self.reason is None and not self.lost.done()

    async def watch(self) -> None:
        """Return when the process is lost; kill it if its heartbeats stop."""
        self.silent_s = 0.0
        while not self.lost.done():
            await asyncio.wait({self.lost}, timeout=self.spec.ping_s)
            self.silent_s += self.spec.ping_s
            if self.silent_s > self.spec.kill_s:
                self.kill(f"it did not answer for {self.spec.kill_s:g} s")

    async def run(self, batch: RowBatch) -> Reply:
        """Run one batch; ``LostError`` if the process ends, also because it took too long."""
        if self.lost.done():
            raise LostError
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Reply] = loop.create_future()
        self._replies.append(reply)
        assert self._transport
        self._transport.write(frame(batch))
        hang_s = self.spec.hang_s

        def give_up() -> None:
            if not reply.done():
                self.kill(f"a batch took longer than {hang_s:g} s")

        # Twice: after this process was stalled, replies that came meanwhile are read first.
        timer = loop.call_later(hang_s, loop.call_later, LATE_S, give_up)
        try:
            return await reply
        finally:
            timer.cancel()

    def kill(self, reason: str) -> None:
        """Kill it, even if it is stopped; ``lost`` follows."""
        if self.alive:
            self.reason = reason
            self.popen.kill()

    async def end(self) -> None:
        """Leave no process, no zombie and no open socket; may be called twice."""
        self.popen.kill()
        await asyncio.to_thread(self.popen.wait)
        if self._heartbeat.fileno() >= 0:  # not ended before
            asyncio.get_running_loop().remove_reader(self._heartbeat)
            self._heartbeat.close()
        if self._transport:
            self._transport.abort()
            await self.lost
        else:
            self._batches.close()

    def ended(self) -> str:
        """Describe how it ended, after ``end``."""
        code = self.popen.returncode
        how = f"signal {-code}, {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{self.reason}; {how}" if self.reason else how

"""This end of an inference process's two sockets: batches with their answers, and pings.

Asyncio protocols that turn what comes into futures: rows go out as
:mod:`trainkit.serve.http.worker` wants them, logits or a failure come back.
"""

import asyncio
from typing import cast

import msgspec

from trainkit.serve.errors import InputError
from trainkit.serve.http.worker import (
    LENGTH,
    Failed,
    FromWorker,
    Logits,
    Ready,
    Refused,
    Run,
    frame,
)

__all__ = ["Batches", "LostError", "Pings"]


class LostError(Exception):
    """The process ended before it answered."""


class Batches(asyncio.Protocol):
    """The socket on which batches go to the process, and its answers come back."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.started: asyncio.Future[None] = loop.create_future()
        self.lost: asyncio.Future[None] = loop.create_future()
        self.has_answered = False
        self._answers: dict[int, asyncio.Future[Logits | Failed]] = {}
        self._received = bytearray()
        self._decoder = msgspec.msgpack.Decoder(FromWorker)
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep it."""
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        """Take the messages that are there as a whole."""
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
        """Let every batch that waits fail."""
        _settle(self.lost)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(LostError())

    def send(self, message: Run) -> asyncio.Future[Logits | Failed]:
        """Send one; the future gets its answer."""
        assert self._transport is not None
        answer: asyncio.Future[Logits | Failed] = asyncio.get_running_loop().create_future()
        self._answers[message.number] = answer
        self._transport.write(frame(message))
        return answer

    def forget(self, number: int) -> None:
        """Nobody waits for this batch any more."""
        self._answers.pop(number, None)

    async def close(self) -> None:
        """Close the socket, after the process's end."""
        if self._transport is not None:
            self._transport.abort()
            await self.lost
        if self.started.done() and not self.started.cancelled():
            self.started.exception()  # was seen, or nobody waits for it


class Pings(asyncio.Protocol):
    """A socket to the process on which a thread sends back what comes."""

    def __init__(self) -> None:
        self.answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep it."""
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        """Take the last ping for answered."""
        _settle(self.answered)

    def send(self) -> None:
        """Send one; ``answered`` is done when it is back."""
        assert self._transport is not None
        self.answered = asyncio.get_running_loop().create_future()
        if not self._transport.is_closing():
            self._transport.write(b"?")

    def close(self) -> None:
        """Close the socket."""
        if self._transport is not None:
            self._transport.abort()


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)

"""The inference process: batches of token ids in, logits out, over a socket.

``python -m trainkit.serve.http.worker ORDER``; the engine starts it, see
:mod:`trainkit.serve.http.engine`. Messages are msgpack, each after its length in four bytes; rows
of unequal length travel end to end, and are padded here.

The model is read from a descriptor that the front holds open: a restart then works when the
bundle's folder is gone. Only a model whose weights lie in a file beside it (over 2 GB) is opened by
its path, and its restart needs the folder.
"""

import os
import queue
import signal
import socket
import struct
import sys
import threading
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

import msgspec
import numpy as np

from trainkit.serve.encoding import IntArray, Tokens, pad
from trainkit.serve.errors import InputError

__all__ = [
    "Failed",
    "FromWorker",
    "Logits",
    "Order",
    "Ping",
    "Pong",
    "Ready",
    "Refused",
    "Run",
    "ToWorker",
    "frame",
    "ragged",
]

LENGTH = struct.Struct("<I")


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What the process is started with: descriptors it inherits, and how to run the model."""

    socket: int
    model: str  # the path, as messages name it
    file: int | None  # the open model file; None: open the path
    threads: int
    providers: tuple[str, ...]
    pad_id: int


class Run(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """One batch: int64 values of all rows end to end, and the rows' lengths."""

    number: int
    lengths: bytes
    ids: bytes
    type_ids: bytes | None  # None: the model takes none
    masks: bytes | None  # None: every token may be read


class Ping(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Asks for a ``Pong``, also while a batch runs."""


class Ready(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The model is loaded."""


class Refused(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The model cannot be loaded; the process ends."""

    sentence: str


class Logits(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """What a batch came to: float32 values of this shape."""

    number: int
    shape: tuple[int, ...]
    values: bytes


class Failed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The session raised on this batch; the process goes on."""

    number: int
    sentence: str


class Pong(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Answers a ``Ping``."""


ToWorker: TypeAlias = Run | Ping
FromWorker: TypeAlias = Ready | Refused | Logits | Failed | Pong


def frame(message: ToWorker | FromWorker) -> bytes:
    """Encode a message, with its length before it."""
    content = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(content)) + content


def ragged(number: int, rows: Sequence[Tokens], *, token_types: bool) -> Run:
    """Put rows end to end."""
    masked = any(row.mask is not None for row in rows)
    return Run(
        number,
        _joined([[len(row.ids) for row in rows]]),
        _joined([row.ids for row in rows]),
        _joined([row.type_ids for row in rows]) if token_types else None,
        _joined([row.mask or [1] * len(row.ids) for row in rows]) if masked else None,
    )


def _joined(rows: Sequence[Sequence[int]]) -> bytes:
    values = array("q")
    for row in rows:
        values.extend(array("q", row))
    return values.tobytes()


def _split(values: bytes | None, lengths: IntArray) -> list[IntArray] | None:
    if values is None:
        return None
    return np.split(np.frombuffer(values, dtype=np.int64), np.cumsum(lengths)[:-1])


class _Batches(Protocol):
    def get(self) -> Run: ...
    def put(self, item: Run) -> None: ...


def main(order: Order) -> None:
    """Load the model, then run batches until the socket closes."""
    # A Ctrl-C and a service manager's SIGTERM reach every process of the group at once. What is in
    # flight must still be answered: the front decides, and this process ends with its socket.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=order.socket)
    batches: queue.SimpleQueue[Run] = queue.SimpleQueue()
    sending = threading.Lock()

    def send(message: FromWorker) -> None:
        try:
            with sending:
                connection.sendall(frame(message))
        except OSError:  # the front is gone
            os._exit(0)

    # Before the model is loaded: if the front ends meanwhile, this process does too.
    threading.Thread(target=_read, args=(connection, batches, send), daemon=True).start()
    try:
        run = _open(order)
    except InputError as error:
        send(Refused(str(error)))
        return
    send(Ready())
    while True:
        send(run(batches.get()))


def _read(connection: socket.socket, batches: _Batches, send: Callable[[FromWorker], None]) -> None:
    """Take messages as they come, and answer pings at once: the session may run for long."""
    decoder = msgspec.msgpack.Decoder(ToWorker)
    stream = connection.makefile("rb")
    while True:
        try:
            size = stream.read(LENGTH.size)
            content = stream.read(LENGTH.unpack(size)[0]) if len(size) == LENGTH.size else b""
        except OSError:
            content = b""
        if not content:
            os._exit(0)  # at once, in the middle of a batch too: nobody waits for it
        message = decoder.decode(content)
        if isinstance(message, Ping):
            send(Pong())
        else:
            batches.put(message)


def _open(order: Order) -> Callable[[Run], Logits | Failed]:
    from trainkit.serve.onnx_session import onnx_runner

    path = order.model
    if order.file is not None:
        folder = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"
        path = f"{folder}/{order.file}"
        os.lseek(order.file, 0, os.SEEK_SET)  # where opening /dev/fd shares the position
    try:
        # Threads that spin take their cores from the front, which tokenises beside them: with two
        # on two busy cores MiniLM took up to twice as long so.
        runner = onnx_runner(
            Path(path), threads=order.threads, providers=order.providers, spinning=False
        )
    except InputError as error:
        raise InputError(str(error).replace(path, order.model)) from None

    def run(batch: Run) -> Logits | Failed:
        lengths = np.frombuffer(batch.lengths, dtype=np.int64)
        ids, types, masks = (
            _split(values, lengths) for values in (batch.ids, batch.type_ids, batch.masks)
        )
        try:
            logits = runner(pad(ids or [], order.pad_id, types, masks))
        except Exception as error:  # ONNX Runtime's exceptions share no base class below Exception
            return Failed(batch.number, " ".join(str(error).split()))
        return Logits(batch.number, logits.shape, logits.astype(np.float32, copy=False).tobytes())

    return run


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=Order))

"""The inference process: batches of token ids in, logits out, over a socket.

``python -m trainkit.serve.http.worker ORDER``; the front starts it, see
:mod:`trainkit.serve.http.inference_process`. Messages are msgpack, each after its length in four
bytes; rows of unequal length travel end to end, and are padded here. Pings come on a socket of
their own, one byte each, and a thread sends them back: the session may run for long, and a batch
should not pay for a hop between threads.

The model is read from a descriptor that the front holds open: a restart then works when the
bundle's folder is gone. Only a model whose weights lie in a file beside it is opened by its path,
and its restart needs the folder, with the same files in it.
"""

import contextlib
import os
import signal
import socket
import struct
import sys
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np

from trainkit.serve.encoding import IntArray, Tokens, pad
from trainkit.serve.errors import InputError
from trainkit.serve.files import FileInfo

__all__ = [
    "Failed",
    "FromWorker",
    "Logits",
    "Order",
    "Ready",
    "Refused",
    "Run",
    "frame",
    "ragged",
]

LENGTH = struct.Struct("<I")


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What the process is started with: descriptors it inherits, and how to run the model."""

    socket: int
    pings: int
    model: str  # the path, as messages name it
    file: int | None  # the open model file; None: open the path
    files: dict[str, FileInfo]  # what must lie there then
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


FromWorker: TypeAlias = Ready | Refused | Logits | Failed


def frame(message: Run | FromWorker) -> bytes:
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


def main(order: Order) -> None:
    """Load the model, then run batches until the socket closes."""
    # A Ctrl-C and a service manager's SIGTERM reach every process of the group at once. What is in
    # flight must still be answered: the front decides, and this process ends with its socket.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=order.socket)
    pings = socket.socket(fileno=order.pings)
    # Before the model is loaded: if the front ends meanwhile, this process does too.
    threading.Thread(target=_send_back, args=(pings,), daemon=True).start()
    with contextlib.suppress(OSError):  # the front is gone
        try:
            run = _open(order)
        except InputError as error:
            connection.sendall(frame(Refused(str(error))))
            return
        connection.sendall(frame(Ready()))
        for batch in _received(connection):
            connection.sendall(frame(run(batch)))


def _send_back(pings: socket.socket) -> None:
    """Answer pings until the front is gone; then end at once, in the middle of a batch too."""
    with contextlib.suppress(OSError):
        while ping := pings.recv(1):
            pings.sendall(ping)
    os._exit(0)


def _received(connection: socket.socket) -> Iterator[Run]:
    """Take batches as they come, until the socket closes."""
    decoder = msgspec.msgpack.Decoder(Run)
    stream = connection.makefile("rb")
    while len(size := stream.read(LENGTH.size)) == LENGTH.size:
        yield decoder.decode(stream.read(LENGTH.unpack(size)[0]))


def _open(order: Order) -> Callable[[Run], Logits | Failed]:
    from trainkit.serve.bundle import check_file
    from trainkit.serve.forward_pool import CPU, split_batches
    from trainkit.serve.onnx_session import onnx_runner

    path = order.model
    for name, expected in order.files.items():
        check_file(Path(path).with_name(name), expected)
    if order.file is not None:
        folder = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"
        path = f"{folder}/{order.file}"
        os.lseek(order.file, 0, os.SEEK_SET)  # where opening /dev/fd shares the position
    try:
        runner = onnx_runner(Path(path), threads=order.threads, providers=order.providers)
    except InputError as error:
        raise InputError(str(error).replace(path, order.model)) from None
    if order.providers[0] == CPU:
        runner = split_batches(runner)

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

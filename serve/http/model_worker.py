"""The program of a model process: takes batches of token ids on a socket and returns their logits.

``python -m trainkit.serve.http.model_worker JSON`` is started by
:mod:`trainkit.serve.http.model_process`. Messages are msgpack, each after its length in four bytes;
rows travel end to end, unpadded. A thread sends heartbeats on a second socket, so that they go on
while the session runs.

The model is read from a descriptor that the parent holds open: a restart works even if the
bundle's folder is gone. Only a model with external weights is opened by its path.
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

import msgspec
import numpy as np

from trainkit.serve.encoding import Batch, IntArray, Tokens, pad
from trainkit.serve.errors import InputError
from trainkit.serve.files import FileInfo

LENGTH = struct.Struct("<I")
UNLIMITED = sys.maxsize


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Inherited descriptors, and how to run the model."""

    batches: int
    heartbeat: int
    model: str  # the path, for messages
    file: int | None  # the open model file; None: open the path
    files: dict[str, FileInfo]  # what must lie at the path then
    threads: int
    providers: tuple[str, ...]
    pad_id: int
    ping_s: float


class RowBatch(msgspec.Struct, frozen=True, array_like=True):
    """One batch: the int64 values of all rows end to end, and the rows' lengths."""

    lengths: bytes
    ids: bytes
    type_ids: bytes | None  # None: the model takes no token types
    masks: bytes | None  # None: every token is visible

    @classmethod
    def of(cls, rows: Sequence[Tokens], *, token_types: bool) -> "RowBatch":
        """Join rows."""
        masked = any(row.mask is not None for row in rows)
        return cls(
            _joined([[len(row.ids) for row in rows]]),
            _joined([row.ids for row in rows]),
            _joined([row.type_ids for row in rows]) if token_types else None,
            _joined([row.mask or [1] * len(row.ids) for row in rows]) if masked else None,
        )


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """The float32 logits of a batch, or an error. The first reply, without logits: it loaded."""

    error: str = ""
    shape: tuple[int, ...] = ()
    values: bytes = b""


def frame(message: RowBatch | Reply) -> bytes:
    """Encode a message, with its length before it."""
    content = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(content)) + content


def _joined(rows: Sequence[Sequence[int]]) -> bytes:
    values = array("q")
    for row in rows:
        values.extend(array("q", row))
    return values.tobytes()


def main(spec: WorkerSpec) -> None:
    """Load the model, then run batches until the socket closes."""
    # A Ctrl-C or a service manager's SIGTERM reaches the whole process group. Requests in progress
    # must still be answered: the parent decides when this process ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=spec.batches)
    heartbeat = socket.socket(fileno=spec.heartbeat)
    threading.Thread(target=_beat, args=(heartbeat, spec.ping_s), daemon=True).start()
    with contextlib.suppress(OSError):  # the parent is gone
        try:
            run = _open(spec)
        except InputError as error:
            connection.sendall(frame(Reply(str(error))))
            return
        connection.sendall(frame(Reply()))
        for batch in _batches(connection):
            connection.sendall(frame(run(batch)))


def _beat(heartbeat: socket.socket, ping_s: float) -> None:
    """Send heartbeats until the parent is gone, then exit even if a batch is running."""
    heartbeat.settimeout(ping_s)
    with contextlib.suppress(ConnectionError):
        while True:
            try:
                if not heartbeat.recv(1):
                    break
            except TimeoutError:
                heartbeat.sendall(b".")
    os._exit(0)


def _batches(connection: socket.socket) -> Iterator[RowBatch]:
    """Yield batches until the socket closes."""
    decoder = msgspec.msgpack.Decoder(RowBatch)
    stream = connection.makefile("rb")
    while len(size := stream.read(LENGTH.size)) == LENGTH.size:
        yield decoder.decode(stream.read(LENGTH.unpack(size)[0]))


def _open(spec: WorkerSpec) -> Callable[[RowBatch], Reply]:
    from trainkit.serve.forward_pool import CPU, CPU_TOKENS, ForwardPool
    from trainkit.serve.onnx_session import onnx_runner

    path = spec.model
    if spec.files:
        from trainkit.serve.bundle import check_file

        for name, expected in spec.files.items():
            check_file(Path(path).with_name(name), expected)
    if spec.file is not None:
        folder = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"
        path = f"{folder}/{spec.file}"
        os.lseek(spec.file, 0, os.SEEK_SET)  # opening /dev/fd may share the position
    try:
        runner = onnx_runner(Path(path), threads=spec.threads, providers=spec.providers)
    except InputError as error:
        raise InputError(str(error).replace(path, spec.model)) from None
    forward = ForwardPool(runner)
    max_tokens = CPU_TOKENS if spec.providers[0] == CPU else UNLIMITED

    def run(batch: RowBatch) -> Reply:
        lengths = np.frombuffer(batch.lengths, dtype=np.int64)
        ends = np.cumsum(lengths)[:-1]
        ids, types, masks = (
            None if values is None else np.split(np.frombuffer(values, dtype=np.int64), ends)
            for values in (batch.ids, batch.type_ids, batch.masks)
        )

        def padded(part: Sequence[int]) -> Batch:
            def pick(rows: list[IntArray] | None) -> list[IntArray] | None:
                return None if rows is None else [rows[index] for index in part]

            return pad(pick(ids) or [], spec.pad_id, pick(types), pick(masks))

        try:
            logits = forward(lengths.tolist(), padded, max_tokens=max_tokens)
        except Exception as error:  # ONNX Runtime's exceptions share no base class below Exception
            return Reply(" ".join(str(error).split()) or type(error).__name__)
        return Reply("", logits.shape, logits.astype(np.float32, copy=False).tobytes())

    return run


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=WorkerSpec))

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
# -P: a file of the working directory must not be imported in place of a library.
PROGRAM = (sys.executable, "-P", "-m", "trainkit.serve.http.model_worker")


class ProcessSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What to run, how, and how long to wait; times in seconds."""

    model: str
    files: dict[str, FileInfo] = {}
    """With external weights, which a descriptor cannot name, both files: they are opened by path
    if they are still the same."""
    pad_id: int
    token_types: bool
    threads: int
    providers: tuple[str, ...]
    start_s: float = 120.0  # for the model to load
    hang_s: float = 30.0  # for one batch
    return_s: float = 30.0  # that a batch waits for a new process
    ping_s: float = 0.2  # between heartbeats
    silent_s: float = 0.6  # without a heartbeat: not ready
    kill_s: float = 2.0  # without a heartbeat: killed; a busy machine is back before that
    pauses_s: tuple[float, float] = (0.1, 5.0)  # between restarts in a row; the first comes at once
    program: tuple[str, ...] = PROGRAM


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


def main(arguments: Sequence[str]) -> None:
    """Load the model, then run batches until the socket closes.

    The arguments are a :class:`ProcessSpec` as JSON and the inherited descriptors: the sockets of
    batches and heartbeats and, unless the model has external weights, the open model file.
    """
    spec = msgspec.json.decode(arguments[0], type=ProcessSpec)
    batches_fd, heartbeat_fd, *files = map(int, arguments[1:])
    # A Ctrl-C or a service manager's SIGTERM reaches the whole process group. Requests in progress
    # must still be answered: the parent decides when this process ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=batches_fd)
    heartbeat = socket.socket(fileno=heartbeat_fd)
    threading.Thread(target=_beat, args=(heartbeat, spec.ping_s), daemon=True).start()
    with contextlib.suppress(OSError):  # the parent is gone
        try:
            run = _open(spec, files)
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
                with contextlib.suppress(TimeoutError):  # a stopped parent reads none
                    heartbeat.send(b".")
    os._exit(0)


def _batches(connection: socket.socket) -> Iterator[RowBatch]:
    """Yield batches until the socket closes."""
    decoder = msgspec.msgpack.Decoder(RowBatch)
    stream = connection.makefile("rb")
    while len(size := stream.read(LENGTH.size)) == LENGTH.size:
        yield decoder.decode(stream.read(LENGTH.unpack(size)[0]))


def _open(spec: ProcessSpec, files: Sequence[int]) -> Callable[[RowBatch], Reply]:
    from trainkit.serve.forward_pool import CPU, CPU_TOKENS, ForwardPool
    from trainkit.serve.onnx_session import onnx_runner

    path = spec.model
    if not files:
        from trainkit.serve.bundle import check_file

        for name, expected in spec.files.items():
            check_file(Path(path).with_name(name), expected)
    for file in files:
        path = f"{'/proc/self/fd' if sys.platform == 'linux' else '/dev/fd'}/{file}"
        os.lseek(file, 0, os.SEEK_SET)  # opening /dev/fd may share the position
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
    main(sys.argv[1:])

"""The protocol between a benchmark and its workers: JSON lines, one reply per request.

A worker reads requests on standard input and ends when that is closed. Arrays travel in ``.npz``
files, so that every engine gets byte-identical inputs and no pipe fills up.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from trainkit.serve.encoding import Batch, Text
from trainkit.serve.types import FloatArray


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Passes over all batches: the seconds of each batch, one tuple per pass.

    Wall time of the call or, if batches arrive by a schedule, from when each was due to its end.
    ``seconds`` is the wall time of the passes, ``cpu_s`` their CPU time over all threads.
    """

    batch_s: tuple[tuple[float, ...], ...]
    seconds: float
    cpu_s: float


class LoadEngine(msgspec.Struct, tag=True):
    """Open the engine; answered by :class:`EngineReady`."""


class TakeBatches(msgspec.Struct, tag=True):
    """Read :func:`save_work`'s file; answered by :class:`Done` or :class:`EngineUnavailable`."""

    path: str


class Warm(msgspec.Struct, tag=True):
    """Run until the passes are equally fast or the time is over; answered by :class:`Measured`."""

    max_seconds: float


class TakeTurn(msgspec.Struct, tag=True):
    """Run all batches, again until the time is over; answered by :class:`Measured`.

    With ``due_s`` instead each once, not before its seconds since the turn's start.
    """

    min_seconds: float
    due_s: tuple[float, ...] = ()


class WriteLogits(msgspec.Struct, tag=True):
    """Write the logits of every batch to this path; answered by :class:`Done`."""

    path: str


Request: TypeAlias = LoadEngine | TakeBatches | Warm | TakeTurn | WriteLogits


class EngineReady(msgspec.Struct, tag=True):
    """The engine is open; ``name`` is what a reader calls it, as "ONNX Runtime".

    ``includes_tokenization`` says that it is given texts; ``versions`` are of its own libraries.
    """

    name: str
    precision: str = "fp32"
    includes_tokenization: bool = False
    versions: dict[str, str] = {}


class EngineUnavailable(msgspec.Struct, tag=True):
    """The runtime is not installed here, or cannot do this work; the reason is one clause."""

    reason: str


class Done(msgspec.Struct, tag=True):
    """It was done, and there is nothing to say about it."""


class Measured(msgspec.Struct, tag=True):
    """A turn or a warm-up, and the most memory that the worker had resident so far.

    ``stable`` is None after a turn.
    """

    turn: Turn
    peak_rss_bytes: int | None
    stable: bool | None = None


class EngineFailed(msgspec.Struct, tag=True):
    """One of our own errors: its sentence, and the exit code of its kind."""

    message: str
    exit_code: int


Reply: TypeAlias = EngineReady | EngineUnavailable | Done | Measured | EngineFailed


class Work(NamedTuple):
    """The same work twice: padded batches of ids, and the texts in them, one list a batch.

    Batches of one length have no ``texts``.
    """

    batches: list[Batch]
    texts: list[list[Text]]


def save_work(path: Path, work: Work) -> None:
    """Write batches and texts, in order; dtypes and shapes are kept."""
    arrays: dict[str, npt.NDArray[Any]] = {
        "texts": np.frombuffer(msgspec.json.encode(work.texts), np.uint8)
    }
    for number, batch in enumerate(work.batches):
        for name, array in batch.tensors().items():
            arrays[f"{number}/{name}"] = array
    np.savez(path, allow_pickle=False, **arrays)


def load_work(path: Path) -> Work:
    """Read what :func:`save_work` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        count = sum(name.endswith("/input_ids") for name in arrays.files)
        stored = [{key: f"{number}/{key}" for key in Batch._fields} for number in range(count)]
        batches = [
            Batch(**{key: arrays[name] for key, name in names.items() if name in arrays.files})
            for names in stored
        ]
        texts = msgspec.json.decode(
            arrays["texts"].tobytes(), type=list[list[str | tuple[str, str]]]
        )
    return Work(batches, texts)


def save_logits(path: Path, logits: Sequence[FloatArray]) -> None:
    """Write one (B, C) array a batch, in order."""
    arrays = {str(number): array for number, array in enumerate(logits)}
    np.savez(path, allow_pickle=False, **arrays)


def load_logits(path: Path) -> list[FloatArray]:
    """Read what :func:`save_logits` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return [arrays[str(number)] for number in range(len(arrays.files))]

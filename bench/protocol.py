"""What a benchmark and its workers say to each other: one JSON object a line, one reply a request.

A worker reads requests on standard input and ends when that is closed. Arrays travel in ``.npz``
files, so that every engine gets byte-identical inputs and no pipe fills up.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np

from trainkit.serve.classifier import FloatArray
from trainkit.serve.encoding import Batch

__all__ = [
    "Done",
    "Failed",
    "Load",
    "Logits",
    "Measured",
    "Ready",
    "Reply",
    "Request",
    "TakeBatches",
    "TakeTurn",
    "Turn",
    "Warm",
    "WarmUp",
    "load_batches",
    "load_logits",
    "save_batches",
    "save_logits",
]


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Passes over all batches: the wall seconds of every batch, one tuple a pass.

    ``cpu_s`` are the CPU seconds of the whole turn, over all threads.
    """

    batch_s: tuple[tuple[float, ...], ...]
    cpu_s: float

    @property
    def seconds(self) -> float:
        """Return the wall seconds of all batches."""
        return sum(sum(one_pass) for one_pass in self.batch_s)


class WarmUp(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The turn before the measurement, and whether its passes had become equally fast."""

    turn: Turn
    stable: bool


class Load(msgspec.Struct, tag=True):
    """Open the engine; answered by :class:`Ready`."""


class TakeBatches(msgspec.Struct, tag=True):
    """Read the batches of :func:`save_batches`; answered by :class:`Done`."""

    path: str


class Warm(msgspec.Struct, tag=True):
    """Run until the passes are equally fast or the time is over; answered by :class:`Measured`."""

    max_seconds: float


class TakeTurn(msgspec.Struct, tag=True):
    """Run all batches, again until the time is over; answered by :class:`Measured`."""

    min_seconds: float


class Logits(msgspec.Struct, tag=True):
    """Write the logits of every batch to this path; answered by :class:`Done`."""

    path: str


Request: TypeAlias = Load | TakeBatches | Warm | TakeTurn | Logits


class Ready(msgspec.Struct, tag=True):
    """The engine is open; ``name`` is what a reader calls it, as "ONNX Runtime"."""

    name: str


class Done(msgspec.Struct, tag=True):
    """It was done, and there is nothing to say about it."""


class Measured(msgspec.Struct, tag=True):
    """A turn or a warm-up, and the most memory that the worker had resident so far.

    ``stable`` is None after a turn.
    """

    turn: Turn
    peak_rss_bytes: int | None
    stable: bool | None = None


class Failed(msgspec.Struct, tag=True):
    """One of our own errors: its sentence, and the exit code of its kind."""

    message: str
    exit_code: int


Reply: TypeAlias = Ready | Done | Measured | Failed


def save_batches(path: Path, batches: Sequence[Batch]) -> None:
    """Write the batches, in order; dtypes and shapes are kept."""
    arrays = {}
    for number, batch in enumerate(batches):
        for name, array in batch.tensors().items():
            arrays[f"{number}/{name}"] = array
    np.savez(path, allow_pickle=False, **arrays)


def load_batches(path: Path) -> list[Batch]:
    """Read what :func:`save_batches` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        count = sum(name.endswith("/input_ids") for name in arrays.files)
        stored = [{key: f"{number}/{key}" for key in Batch._fields} for number in range(count)]
        return [
            Batch(**{key: arrays[name] for key, name in names.items() if name in arrays.files})
            for names in stored
        ]


def save_logits(path: Path, logits: Sequence[FloatArray]) -> None:
    """Write one (B, C) array a batch, in order."""
    arrays = {str(number): array for number, array in enumerate(logits)}
    np.savez(path, allow_pickle=False, **arrays)


def load_logits(path: Path) -> list[FloatArray]:
    """Read what :func:`save_logits` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return [arrays[str(number)] for number in range(len(arrays.files))]

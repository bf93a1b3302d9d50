"""A process that owns one engine: ``python -m trainkit.bench.worker SOURCE THREADS``.

SOURCE is a run's folder, which PyTorch computes eagerly, or a bundle. Requests come in on standard
input, replies go out on standard output (:mod:`trainkit.bench.protocol`); between them it blocks in
``read`` and takes no CPU time. It ends when standard input is closed, so it cannot outlive the
process that started it.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from trainkit.bench.environment import peak_rss_bytes
from trainkit.bench.protocol import (
    Done,
    Failed,
    Load,
    Logits,
    Measured,
    Ready,
    Reply,
    Request,
    TakeBatches,
    TakeTurn,
    Turn,
    Warm,
    load_batches,
    save_logits,
)
from trainkit.serve.bundle import MANIFEST, Format, open_bundle
from trainkit.serve.classifier import Runner
from trainkit.serve.encoding import Batch
from trainkit.serve.errors import TrainkitError

__all__ = ["Engine", "is_stable", "open_engine", "speak", "take_turn"]

NAMES: dict[Format, str] = {
    "onnx": "ONNX Runtime",
    "torchscript": "TorchScript",
    "pt2": "torch.export",
    "aoti": "AOTInductor",
}
# Engines allocate, choose kernels and optimise (TorchScript: by shape) in their first passes.
STABLE_PASSES = 3
STABLE_SPREAD = 0.1


class Engine(NamedTuple):
    """What computes: its name for the reader, and a function from a padded batch to logits."""

    name: str
    run: Runner


def open_engine(source: Path, threads: int) -> Engine:
    """Open a run or a bundle with so many threads; ``InputError`` where it is neither."""
    if not (source / MANIFEST).is_file():
        return _eager(source, threads)
    from trainkit.export.runtimes import runner

    bundle = open_bundle(source)
    format, precision = bundle.manifest.format, bundle.manifest.precision
    if format != "onnx":
        _limit_torch(threads)
    name = NAMES[format] if precision == "fp32" else f"{NAMES[format]} {precision}"
    return Engine(name, runner(bundle, threads))


def _eager(source: Path, threads: int) -> Engine:
    from trainkit.models.classifier import torch_runner
    from trainkit.trainer import checkpoint

    _limit_torch(threads)
    return Engine("PyTorch eager", torch_runner(checkpoint.load(source).model))


def _limit_torch(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def one_pass(run: Runner, batches: Sequence[Batch]) -> tuple[float, ...]:
    """Run every batch once; returns the wall seconds of each."""
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        run(batch)
        seconds.append(time.perf_counter() - start)
    return tuple(seconds)


def take_turn(
    run: Runner, batches: Sequence[Batch], ended: Callable[[list[tuple[float, ...]], float], bool]
) -> Turn:
    """Make passes until ``ended(passes, elapsed_s)``; always at least one."""
    passes: list[tuple[float, ...]] = []
    start, cpu = time.perf_counter(), time.process_time()
    while not passes or not ended(passes, time.perf_counter() - start):
        passes.append(one_pass(run, batches))
    return Turn(tuple(passes), time.process_time() - cpu)


def is_stable(passes: Sequence[Sequence[float]]) -> bool:
    """Return whether the last passes took the same time, within a tenth, after a first one."""
    last = [sum(one) for one in passes[-STABLE_PASSES:]]
    return len(passes) > STABLE_PASSES and max(last) - min(last) <= STABLE_SPREAD * float(
        np.median(last)
    )


def answer(request: Request, engine: Engine, batches: Sequence[Batch]) -> Reply:
    """Do what a request asks of an open engine."""
    match request:
        case Warm(max_seconds):
            turn = take_turn(
                engine.run, batches, lambda passes, s: is_stable(passes) or s >= max_seconds
            )
            return Measured(turn, peak_rss_bytes(), is_stable(turn.batch_s))
        case TakeTurn(min_seconds):
            turn = take_turn(engine.run, batches, lambda _, s: s >= min_seconds)
            return Measured(turn, peak_rss_bytes())
        case Logits(path):
            save_logits(Path(path), [engine.run(batch) for batch in batches])
            return Done()
        case _:
            raise AssertionError(f"unexpected {request}")


def speak(load: Callable[[], Engine]) -> None:
    """Answer requests until standard input ends.

    An error of ours is sent to the parent; any other ends the process with its traceback on
    standard error, whose last line the parent quotes.
    """
    # Libraries print: only the protocol keeps the real standard output, the rest goes to stderr.
    with os.fdopen(os.dup(1), "wb", buffering=0) as replies:
        os.dup2(2, 1)
        engine, batches = None, list[Batch]()
        for line in sys.stdin.buffer:
            request = msgspec.json.decode(line, type=Request)
            reply: Reply
            try:
                if isinstance(request, Load):
                    engine = load()
                    reply = Ready(engine.name)
                elif isinstance(request, TakeBatches):
                    batches, reply = load_batches(Path(request.path)), Done()
                else:
                    assert engine is not None  # the parent loads first
                    reply = answer(request, engine, batches)
            except TrainkitError as error:
                reply = Failed(str(error), error.exit_code)
            replies.write(msgspec.json.encode(reply) + b"\n")


if __name__ == "__main__":
    speak(lambda: open_engine(Path(sys.argv[1]), int(sys.argv[2])))

"""A process that owns one engine: ``python -m trainkit.bench.race.worker RUNTIME SOURCE THREADS``.

Requests come in on standard input, replies go out on standard output
(:mod:`trainkit.bench.race.protocol`); between them it blocks in ``read`` and takes no CPU time. It
ends when standard input is closed, so it cannot outlive the process that started it. A peer's
environment runs it too: it needs nothing but trainkit's own serving part.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from trainkit.bench.engines.base import Engine, EngineUnavailableError
from trainkit.bench.engines.registry import open_engine
from trainkit.bench.measure.procfs import peak_rss_bytes
from trainkit.bench.race.protocol import (
    Done,
    EngineFailed,
    EngineReady,
    EngineUnavailable,
    LoadEngine,
    Measured,
    Reply,
    Request,
    TakeBatches,
    TakeTurn,
    Turn,
    Warm,
    Work,
    WriteLogits,
    load_work,
    save_logits,
)
from trainkit.serve.errors import TrainkitError

# Engines allocate, choose kernels and optimise (TorchScript: by shape) in their first passes.
STABLE_PASSES = 3
STABLE_SPREAD = 0.1

# Of each time in seconds: what lies behind is the clock's own noise, and would double the reports.
DIGITS = 7

Call = Callable[[Any], Any]
"""An engine's function of a padded batch of ids, or of a list of texts."""


def one_pass(call: Call, items: Sequence[Any]) -> tuple[float, ...]:
    """Run every batch once; returns the wall seconds of each."""
    seconds = []
    for item in items:
        start = time.perf_counter()
        call(item)
        seconds.append(round(time.perf_counter() - start, DIGITS))
    return tuple(seconds)


def take_turn(
    call: Call, items: Sequence[Any], ended: Callable[[list[tuple[float, ...]], float], bool]
) -> Turn:
    """Make passes until ``ended(passes, elapsed_s)``; always at least one."""
    passes: list[tuple[float, ...]] = []
    start, cpu = time.perf_counter(), time.process_time()
    while not passes or not ended(passes, time.perf_counter() - start):
        passes.append(one_pass(call, items))
    seconds = sum(sum(one) for one in passes)
    return Turn(tuple(passes), seconds, time.process_time() - cpu)


def scheduled_turn(call: Call, items: Sequence[Any], due_s: Sequence[float]) -> Turn:
    """Run one item after the other, from the first on again, none before it is due.

    The seconds of each run from when it was due, so that one that waits for another counts its
    waiting (Tene's coordinated omission).
    """
    latencies = []
    start, cpu = time.perf_counter(), time.process_time()
    for number, due in enumerate(due_s):
        if (early := start + due - time.perf_counter()) > 0:
            time.sleep(early)
        call(items[number % len(items)])
        latencies.append(round(time.perf_counter() - start - due, DIGITS))
    return Turn((tuple(latencies),), time.perf_counter() - start, time.process_time() - cpu)


def is_stable(passes: Sequence[Sequence[float]]) -> bool:
    """Return whether the last passes took the same time, within a tenth, after a first one."""
    last = [sum(one) for one in passes[-STABLE_PASSES:]]
    return len(passes) > STABLE_PASSES and max(last) - min(last) <= STABLE_SPREAD * float(
        np.median(last)
    )


def answer(request: Request, call: Call, items: Sequence[Any]) -> Reply:
    """Do what a request asks of an open engine."""
    match request:
        case Warm(max_seconds):
            turn = take_turn(call, items, lambda passes, s: is_stable(passes) or s >= max_seconds)
            return Measured(turn, peak_rss_bytes(), is_stable(turn.batch_s))
        case TakeTurn(min_seconds, due_s):
            if due_s:
                return Measured(scheduled_turn(call, items, due_s), peak_rss_bytes())
            turn = take_turn(call, items, lambda _, s: s >= min_seconds)
            return Measured(turn, peak_rss_bytes())
        case WriteLogits(path):
            save_logits(Path(path), [call(item) for item in items])
            return Done()
        case _:
            raise AssertionError(f"unexpected {request}")


def _items(engine: Engine, work: Work) -> Sequence[Any]:
    """Return what this engine takes: ids, or the texts themselves."""
    if engine.run is not None:
        return work.batches
    if not work.texts:
        raise EngineUnavailableError("it takes texts, and these are token ids")
    return work.texts


def speak(load: Callable[[], Engine]) -> None:
    """Answer requests until standard input ends.

    An error of ours is sent to the parent; any other ends the process with its traceback on
    standard error, whose last line the parent quotes.
    """
    # Libraries print: only the protocol keeps the real standard output, the rest goes to stderr.
    with os.fdopen(os.dup(1), "wb", buffering=0) as replies:
        os.dup2(2, 1)
        engine: Engine | None = None
        items: Sequence[Any] = ()
        for line in sys.stdin.buffer:
            request = msgspec.json.decode(line, type=Request)
            reply: Reply
            try:
                if isinstance(request, LoadEngine):
                    engine = load()
                    reply = _ready(engine)
                elif isinstance(request, TakeBatches):
                    assert engine is not None  # the parent loads first
                    items, reply = _items(engine, load_work(Path(request.path))), Done()
                else:
                    assert engine is not None
                    call = engine.run or engine.classify
                    assert call is not None
                    reply = answer(request, call, items)
            except EngineUnavailableError as error:
                reply = EngineUnavailable(str(error))
            except TrainkitError as error:
                reply = EngineFailed(str(error), error.exit_code)
            replies.write(msgspec.json.encode(reply) + b"\n")


def _ready(engine: Engine) -> EngineReady:
    return EngineReady(engine.name, engine.precision, engine.run is None, dict(engine.versions))


if __name__ == "__main__":
    runtime, source, threads = sys.argv[1:]
    speak(lambda: open_engine(runtime, Path(source), int(threads)))

"""Engines side by side: each in a process of its own, all alive together, taking turns.

In go runs or bundles of one model, and texts; out comes a :class:`Result`. Turns are interleaved so
that whatever else the machine does hits every engine alike, and only ratios inside a round are
compared. Processes of their own, because several ONNX Runtime sessions in one process slow each
other and torch down with spinning threads, tenfold at worst.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainkit.bench import environment
from trainkit.bench.environment import Environment
from trainkit.bench.process import WorkerProcess
from trainkit.bench.protocol import (
    Done,
    Load,
    Logits,
    Measured,
    Ready,
    TakeBatches,
    TakeTurn,
    Turn,
    Warm,
    WarmUp,
    load_logits,
    save_batches,
)
from trainkit.bench.result import EngineResult, Ratio, Result, Settings
from trainkit.bench.samples import bootstrap_interval, percentile, spread
from trainkit.bench.workload import Workload, prepare
from trainkit.export import parity
from trainkit.serve.classifier import FloatArray, Runner

__all__ = ["run", "worker_command"]

# Threads of OpenMP and ONNX Runtime spin for some milliseconds after their work is done; the next
# engine must not share the cores with them.
PAUSE_SECONDS = 0.03
NOISY_SPREAD = 0.15
NOISY_LOAD_SHARE = 0.5

Progress = Callable[[str], None]


class _Running(NamedTuple):
    """A worker with an open engine, and what it measured so far."""

    worker: WorkerProcess
    name: str
    load_s: float
    warm_up: WarmUp
    logits: list[FloatArray]
    rounds: list[Measured]


def worker_command(source: Path, threads: int) -> list[str]:
    """Return the command that starts the worker of ``source``."""
    # -P: a torch.py in the user's working directory is not ours to import.
    return [sys.executable, "-P", "-m", "trainkit.bench.worker", str(source), str(threads)]


def run(
    sources: Sequence[Path],
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    threads: int | None = None,
    min_seconds: float = 10.0,
    min_rounds: int = 20,
    progress: Progress = lambda step: None,
    command: Sequence[str] = (),
    worker: Callable[[Path, int], Sequence[str]] = worker_command,
) -> Result:
    """Measure the engines of ``sources`` on ``texts``, in arrival order; the first is the baseline.

    ``threads`` an engine, one a usable core where None; ``min_seconds`` are an engine's own.
    ``command`` is what the user typed, for the report. ``InputError`` for input that cannot be
    measured, ``CheckFailedError`` for a worker that died; an engine with wrong outputs is marked in
    the result, and :func:`trainkit.bench.result.check` makes an error of it.
    """
    settings = Settings(
        batch_size=batch_size,
        threads=environment.usable_cores() if threads is None else threads,
        min_seconds=min_seconds,
        min_rounds=min_rounds,
    )
    before = environment.describe()
    progress("tokenise")
    work = prepare(sources, texts, batch_size)
    # The workers end before the folder with their logs and arrays is removed.
    with tempfile.TemporaryDirectory(prefix="trainkit-bench-") as scratch, ExitStack() as workers:
        save_batches(Path(scratch, "batches.npz"), work.batches)
        engines = []
        for number, source in enumerate(sources):
            progress(f"load and warm up {source}")
            started = time.perf_counter()
            process = WorkerProcess(
                worker(source, settings.threads), str(source), Path(scratch, f"{number}.log")
            )
            workers.enter_context(process)
            engines.append(_open(process, started, Path(scratch), settings))
        _race(engines, settings, progress)
    results = _results(sources, engines, work)
    noise = _noise(results, before)
    return Result(
        command=tuple(command),
        date=datetime.now(UTC).replace(microsecond=0),
        settings=settings,
        environment_before=before,
        environment_after=environment.describe(),
        texts=work.texts,
        batches=len(work.batches),
        tokens=work.tokens,
        padding_share=work.padding_share,
        tokenisation_s=work.tokenisation_s,
        noisy=bool(noise),
        noisy_because=noise,
        engines=results,
    )


def _open(worker: WorkerProcess, started: float, scratch: Path, settings: Settings) -> _Running:
    """Load the engine, warm it up, and ask for its outputs."""
    name = worker.ask(Load(), Ready).name
    load_s = time.perf_counter() - started
    worker.ask(TakeBatches(str(scratch / "batches.npz")), Done)
    warmed = worker.ask(Warm(settings.warm_up_max_seconds), Measured)
    worker.ask(Logits(str(scratch / "logits.npz")), Done)
    return _Running(
        worker=worker,
        name=name,
        load_s=load_s,
        warm_up=WarmUp(warmed.turn, stable=bool(warmed.stable)),
        logits=load_logits(scratch / "logits.npz"),
        rounds=[],
    )


def _race(engines: Sequence[_Running], settings: Settings, progress: Progress) -> None:
    """Let the engines take turns, in an order that rotates, until time and rounds are enough."""
    turn = TakeTurn(settings.min_seconds / settings.min_rounds)
    seconds = [0.0] * len(engines)
    done = 0
    while done < settings.min_rounds or min(seconds) < settings.min_seconds:
        progress(f"round {done + 1} of {max(settings.min_rounds, done + 1)}")
        for place in range(len(engines)):
            number = (done + place) % len(engines)
            time.sleep(PAUSE_SECONDS)
            measured = engines[number].worker.ask(turn, Measured)
            engines[number].rounds.append(measured)
            seconds[number] += measured.turn.seconds
        done += 1


def _results(
    sources: Sequence[Path], engines: Sequence[_Running], work: Workload
) -> tuple[EngineResult, ...]:
    named = ((f"batch {number}", batch) for number, batch in enumerate(work.batches, start=1))
    cases = parity.reference_cases(_replay(engines[0].logits), named)
    baseline_rates = _texts_per_s(engines[0], work.texts)
    results = [_result(sources[0], engines[0], work.texts, None, None)]
    for source, engine, precision in zip(
        sources[1:], engines[1:], work.precisions[1:], strict=True
    ):
        outputs = parity.compare(cases, _replay(engine.logits), precision)
        ratio = _ratio(_texts_per_s(engine, work.texts), baseline_rates)
        results.append(_result(source, engine, work.texts, ratio, outputs))
    return tuple(results)


def _replay(logits: Sequence[FloatArray]) -> Runner:
    """Give the outputs that a worker wrote, batch by batch, to the one parity checker."""
    recorded = iter(logits)
    return lambda batch: next(recorded)


def _texts_per_s(engine: _Running, texts: int) -> list[float]:
    """Return one rate a round."""
    turns = [measured.turn for measured in engine.rounds]
    return [texts * len(turn.batch_s) / turn.seconds for turn in turns]


def _ratio(rates: Sequence[float], baseline: Sequence[float]) -> Ratio:
    ratios = [rate / base for rate, base in zip(rates, baseline, strict=True)]
    low, high = bootstrap_interval(ratios)
    return Ratio(float(np.median(ratios)), low, high)


def _result(
    source: Path,
    engine: _Running,
    texts: int,
    ratio: Ratio | None,
    outputs: parity.Report | None,
) -> EngineResult:
    turns: tuple[Turn, ...] = tuple(measured.turn for measured in engine.rounds)
    batch_ms = [1000 * s for turn in turns for one_pass in turn.batch_s for s in one_pass]
    return EngineResult(
        name=engine.name,
        source=str(source),
        texts_per_s=float(np.median(_texts_per_s(engine, texts))),
        p50_ms=percentile(batch_ms, 50),
        p90_ms=percentile(batch_ms, 90),
        p99_ms=percentile(batch_ms, 99),
        ratio=ratio,
        outputs=outputs,
        wrong=outputs is not None and not outputs.passed,
        cores_used=sum(turn.cpu_s for turn in turns) / sum(turn.seconds for turn in turns),
        peak_rss_bytes=engine.rounds[-1].peak_rss_bytes,
        load_s=engine.load_s,
        folder_bytes=sum(path.stat().st_size for path in source.iterdir() if path.is_file()),
        warm_up=engine.warm_up,
        rounds=turns,
    )


def _noise(engines: Sequence[EngineResult], before: Environment) -> tuple[str, ...]:
    """Return the reasons to trust these timings less; none on a quiet machine."""
    reasons = []
    load = before.load_average[0]
    if load > NOISY_LOAD_SHARE * before.cores:
        reasons.append(f"the load average was {load:.1f} on {before.cores} cores before it began")
    baseline = engines[0]
    variation = spread([len(turn.batch_s) / turn.seconds for turn in baseline.rounds])
    if variation > NOISY_SPREAD:
        reasons.append(
            f"the middle half of {baseline.name}'s rounds spreads over "
            f"{100 * variation:.0f} % of their median"
        )
    reasons += [
        f"{engine.name} was not yet steady after {engine.warm_up.turn.seconds:.1f} s of warm-up"
        for engine in engines
        if not engine.warm_up.stable
    ]
    return tuple(reasons)

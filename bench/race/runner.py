"""Engines side by side: each in a process of its own, all alive together, taking turns.

Turns are interleaved so that disturbances hit every engine alike, and only ratios inside a round
are compared. Engines need processes of their own because the spinning threads of several ONNX
Runtime sessions in one process slow each other and torch down, up to tenfold.
"""

import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from trainkit.bench.engines.base import EngineUnavailableError
from trainkit.bench.engines.registry import Spec, python_of
from trainkit.bench.measure import environment
from trainkit.bench.measure.arrivals import arrivals
from trainkit.bench.race.protocol import (
    Done,
    EngineReady,
    LoadEngine,
    Measured,
    TakeBatches,
    TakeTurn,
    Warm,
    WriteLogits,
    load_logits,
    save_work,
)
from trainkit.bench.race.summary import (
    EngineRun,
    OpenEngine,
    finished,
    logit_std,
    noise_of,
    result_of,
)
from trainkit.bench.race.worker_process import WorkerProcess
from trainkit.bench.race.workload import Workload, prepare
from trainkit.bench.result import BenchmarkSettings, EngineInfo, Result, Unavailable
from trainkit.data.readers import Example
from trainkit.serve.bundle import MANIFEST, open_bundle
from trainkit.serve.errors import InputError

# Threads of OpenMP and ONNX Runtime spin for some milliseconds after their work; the next engine
# must not share the cores with them.
PAUSE_SECONDS = 0.03

ProgressCallback: TypeAlias = Callable[[str], None]
WorkerCommand: TypeAlias = Callable[[Spec, int], Sequence[str]]
Raced: TypeAlias = tuple[Workload, list[EngineRun], list[Unavailable]]


def worker_command(spec: Spec, threads: int) -> list[str]:
    """Return the command of a worker; raises ``EngineUnavailableError`` without its environment."""
    python = str(python_of(spec.runtime) or sys.executable)
    # -P: a torch.py in the user's working directory must not be imported.
    module = [python, "-P", "-m", "trainkit.bench.race.worker"]
    return [*module, spec.runtime, str(spec.source), str(threads)]


def run(
    specs: Sequence[Spec],
    examples: Sequence[Example],
    settings: BenchmarkSettings,
    *,
    data: str = "",
    on_progress: ProgressCallback = lambda step: None,
    command: Sequence[str] = (),
    worker: WorkerCommand = worker_command,
    peak_flops: Mapping[int, float] | None = None,
    samples: Path | None = None,
) -> Result:
    """Measure each of ``specs`` with each number of threads; the first is the baseline.

    ``examples`` come in their order of arrival and are called ``data`` in the report; ``command``
    is what the user typed. ``samples`` names an ``.npz`` file for the time of every batch.
    ``peak_flops`` is the machine's peak in operations/s, by number of threads, for the column
    "roofline share".

    Raises ``InputError`` for input that cannot be measured and ``CheckFailedError`` if a worker
    dies. An engine with wrong outputs is marked in the result, and
    :func:`trainkit.bench.result.check` raises an error for it. A runtime that cannot be opened is
    listed as unavailable; for the baseline that is an ``InputError``.
    """
    on_progress("tokenise")
    return run_on(
        prepare([spec.source for spec in specs], examples, settings),
        specs,
        settings,
        data=data,
        on_progress=on_progress,
        command=command,
        worker=worker,
        peak_flops=peak_flops,
        samples=samples,
    )


def run_on(
    workloads: Sequence[Workload],
    specs: Sequence[Spec],
    settings: BenchmarkSettings,
    *,
    data: str = "",
    on_progress: ProgressCallback = lambda step: None,
    command: Sequence[str] = (),
    worker: WorkerCommand = worker_command,
    peak_flops: Mapping[int, float] | None = None,
    samples: Path | None = None,
) -> Result:
    """Do the same on given workloads; of ``settings`` only durations and threads are used.

    All ``specs`` must be of one model.
    """
    if samples is not None:
        _save_samples((), samples)  # what cannot be written is known now, not after the race
    before, steal = environment.describe(), environment.cpu_steal_monitor()
    # The workers end before the folder with their logs and arrays is removed.
    with tempfile.TemporaryDirectory(prefix="trainkit-bench-") as folder, ExitStack() as workers:
        scratch = Path(folder)
        engines, unavailable = _open_all(specs, settings, worker, scratch, workers, on_progress)
        raced = [_race_on(one, engines, settings, scratch, on_progress) for one in workloads]
    if samples is not None:
        _save_samples(raced, samples)
    std = logit_std([runs[0] for _, runs, _ in raced])
    results = [result_of(*one, peak_flops or {}, std) for one in raced]
    everything = [one for _, runs, _ in raced for one in runs]
    infos = tuple(finished(engine, everything) for engine in engines)
    noise = (*noise_of(results, infos, before), *steal())
    return Result(
        command=tuple(command),
        date=datetime.now(UTC).replace(microsecond=0),
        data=data,
        settings=settings,
        environment=before,
        environment_after=environment.describe(),
        peak_flops=dict(peak_flops or {}),
        noisy=bool(noise),
        noisy_because=noise,
        engines=infos,
        unavailable=tuple(unavailable),
        workloads=tuple(results),
    )


def _save_samples(raced: Sequence[Raced], path: Path) -> None:
    arrays = {
        f"{workload.name}/{run.engine.number}/{number}": np.array(turn.batch_s)
        for workload, runs, _ in raced
        for run in runs
        for number, turn in enumerate(run.turns)
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}); choose another file."
        ) from None


def load_samples(path: Path) -> dict[str, npt.NDArray[np.float64]]:
    """Read the seconds of every batch from a ``samples`` file.

    Each key is ``WORKLOAD/ENGINE/ROUND`` (names and indices of the result), each value an array
    (passes, batches); in the server scenario (1, requests).
    """
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _open_all(
    specs: Sequence[Spec],
    settings: BenchmarkSettings,
    worker: WorkerCommand,
    scratch: Path,
    workers: ExitStack,
    on_progress: ProgressCallback,
) -> tuple[list[OpenEngine], list[Unavailable]]:
    engines: list[OpenEngine] = []
    unavailable: dict[Spec, Unavailable] = {}
    for spec, threads in itertools.product(specs, settings.threads):
        if spec in unavailable:
            continue
        name = f"{spec.runtime}:{spec.source}"
        on_progress(f"load {name}")
        started = time.perf_counter()
        try:
            log = scratch / f"{len(engines)}.log"
            process = WorkerProcess(worker(spec, threads), name, log)
            workers.enter_context(process)
            ready = process.ask(LoadEngine(), EngineReady)
        except EngineUnavailableError as error:
            if not engines:
                raise InputError(
                    f"the baseline {name} is not available: {error}. Put another engine first."
                ) from None
            unavailable[spec] = Unavailable(
                runtime=spec.runtime, source=str(spec.source), reason=str(error)
            )
            continue
        info = EngineInfo(
            name=ready.name,
            runtime=spec.runtime,
            source=str(spec.source),
            precision=ready.precision,
            threads=threads,
            load_s=time.perf_counter() - started,
            cold_start_s=0.0,  # known after the first answer
            peak_rss_bytes=None,
            file_bytes=sum(path.stat().st_size for path in spec.source.iterdir() if path.is_file()),
            includes_tokenization=ready.includes_tokenization,
            versions=ready.versions,
            model_sha256=_model_sha256(spec.source),
        )
        engines.append(OpenEngine(process, len(engines), info))
    return engines, list(unavailable.values())


def _model_sha256(source: Path) -> str | None:
    if not (source / MANIFEST).is_file():
        return None
    bundle = open_bundle(source)
    return bundle.manifest.files[bundle.model_path.name].sha256


def _race_on(
    workload: Workload,
    engines: Sequence[OpenEngine],
    settings: BenchmarkSettings,
    scratch: Path,
    on_progress: ProgressCallback,
) -> Raced:
    """Race the engines that can do the work, and list those that cannot."""
    save_work(scratch / "work.npz", workload.work)
    runs: list[EngineRun] = []
    unavailable: list[Unavailable] = []
    for engine in engines:
        on_progress(f"{workload.name}: warm up {engine.info.name}")
        try:
            runs.append(_begin(engine, settings, scratch))
        except EngineUnavailableError as error:
            info = engine.info
            unavailable.append(
                Unavailable(runtime=info.runtime, source=info.source, reason=str(error))
            )
    if not runs:
        raise InputError(f"no engine can do '{workload.name}': {unavailable[0].reason}.")
    _race(runs, workload, settings, on_progress)
    return workload, runs, unavailable


def _begin(engine: OpenEngine, settings: BenchmarkSettings, scratch: Path) -> EngineRun:
    """Hand the work over, warm up, and ask for the outputs."""
    engine.worker.ask(TakeBatches(str(scratch / "work.npz")), Done)
    warm_up = engine.worker.ask(Warm(settings.warm_up_max_seconds), Measured)
    engine.worker.ask(WriteLogits(str(scratch / "logits.npz")), Done)
    logits = load_logits(scratch / "logits.npz")
    return EngineRun(engine, warm_up.turn, bool(warm_up.stable), logits, turns=[])


def _race(
    runs: Sequence[EngineRun],
    workload: Workload,
    settings: BenchmarkSettings,
    on_progress: ProgressCallback,
) -> None:
    """Let the engines take turns, in an order that rotates, until time and rounds are enough."""
    seconds = [0.0] * len(runs)
    done = 0
    while done < settings.min_rounds or min(seconds) < settings.min_seconds:
        on_progress(f"{workload.name}: round {done + 1} of {max(settings.min_rounds, done + 1)}")
        request = _turn(workload, settings, done)
        for place in range(len(runs)):
            number = (done + place) % len(runs)
            time.sleep(PAUSE_SECONDS)
            turn = runs[number].engine.worker.ask(request, Measured).turn
            runs[number].turns.append(turn)
            seconds[number] += turn.seconds
        done += 1


def _turn(workload: Workload, settings: BenchmarkSettings, done: int) -> TakeTurn:
    """Return one round's turn: in the server scenario new arrivals, the same for each engine."""
    seconds = settings.min_seconds / settings.min_rounds
    if workload.rate is None:
        return TakeTurn(seconds)
    count = max(1, round(workload.rate * seconds))
    due_s = arrivals("poisson", workload.rate, count, seed=settings.seed + done)
    return TakeTurn(0.0, tuple(float(due) for due in due_s))

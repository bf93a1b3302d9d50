"""Engines side by side: each in a process of its own, all alive together, taking turns.

In go runtimes on runs, bundles or Hugging Face folders of one model, and texts; out comes a
:class:`Result`. Turns are interleaved so that whatever else the machine does hits every engine
alike, and only ratios inside a round are compared. Processes of their own, because several ONNX
Runtime sessions in one process slow each other and torch down with spinning threads, tenfold at
worst.
"""

import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from trainkit.bench.engines.base import NotThereError
from trainkit.bench.engines.registry import Spec, python_of
from trainkit.bench.measure import environment, roofline
from trainkit.bench.measure.arrivals import arrivals
from trainkit.bench.race.protocol import (
    Done,
    Load,
    Logits,
    Measured,
    Ready,
    TakeBatches,
    TakeTurn,
    Warm,
    load_logits,
    save_work,
)
from trainkit.bench.race.summary import Raced, Running, noise_of, result_of, spread_of, with_end
from trainkit.bench.race.worker_process import WorkerProcess
from trainkit.bench.race.workload import Workload, prepare
from trainkit.bench.result import Absent, Engine, Result, Settings, WarmUp
from trainkit.data.readers import Example
from trainkit.serve.bundle import MANIFEST, open_bundle
from trainkit.serve.errors import InputError

__all__ = ["run", "run_on", "worker_command"]

# Threads of OpenMP and ONNX Runtime spin for some milliseconds after their work is done; the next
# engine must not share the cores with them.
PAUSE_SECONDS = 0.03

Progress = Callable[[str], None]


def worker_command(spec: Spec, threads: int) -> list[str]:
    """Return the command that starts a worker; ``NotThereError`` without its environment."""
    # -P: a torch.py in the user's working directory is not ours to import.
    python = str(python_of(spec.runtime) or sys.executable)
    return [
        python,
        "-P",
        "-m",
        "trainkit.bench.race.worker",
        spec.runtime,
        str(spec.source),
        str(threads),
    ]


def run(
    specs: Sequence[Spec],
    examples: Sequence[Example],
    settings: Settings,
    *,
    data: str = "",
    progress: Progress = lambda step: None,
    command: Sequence[str] = (),
    worker: Callable[[Spec, int], Sequence[str]] = worker_command,
    with_roofline: bool = True,
) -> Result:
    """Measure each of ``specs`` with each number of threads; the first is the baseline.

    ``examples`` in their order of arrival, named ``data`` in the report; ``command`` is what the
    user typed. ``InputError`` for input that cannot be measured, ``CheckFailedError`` for a worker
    that died; an engine with wrong outputs is marked in the result, and
    :func:`trainkit.bench.result.check` makes an error of it. A runtime that is not there is listed
    as absent; ``InputError`` if the baseline is.
    """
    progress("tokenise")
    workloads = prepare([spec.source for spec in specs], examples, settings)
    return run_on(
        workloads,
        specs,
        settings,
        data=data,
        progress=progress,
        command=command,
        worker=worker,
        with_roofline=with_roofline,
    )


def run_on(
    workloads: Sequence[Workload],
    specs: Sequence[Spec],
    settings: Settings,
    *,
    data: str = "",
    progress: Progress = lambda step: None,
    command: Sequence[str] = (),
    worker: Callable[[Spec, int], Sequence[str]] = worker_command,
    with_roofline: bool = True,
) -> Result:
    """Do the same on workloads that the caller made; of ``settings`` only times and threads count.

    The caller sees to it that all ``specs`` are of one model.
    """
    before, theft = environment.describe(), environment.cpu_steal_monitor()
    roof = None
    if with_roofline:
        progress("measure the machine's peak")
        roof = roofline.measure(settings.threads)
    # The workers end before the folder with their logs and arrays is removed.
    with tempfile.TemporaryDirectory(prefix="trainkit-bench-") as folder, ExitStack() as workers:
        scratch = Path(folder)
        engines, absent = _open_all(specs, settings, worker, scratch, workers, progress)
        raced = [_race_on(workload, engines, settings, scratch, progress) for workload in workloads]
    if roof is not None:  # a share of a peak that other work held down would be too good
        progress("measure the machine's peak again")
        roof = roof.or_better(roofline.measure(settings.threads))
    logits_spread = spread_of([able[0] for _, able, _ in raced])
    results = [result_of(*one, roof, logits_spread) for one in raced]
    described = tuple(with_end(engine, results) for engine in engines)
    noise = (*noise_of(results, described, before), *theft())
    return Result(
        command=tuple(command),
        date=datetime.now(UTC).replace(microsecond=0),
        data=data,
        settings=settings,
        environment_before=before,
        environment_after=environment.describe(),
        roofline=roof,
        noisy=bool(noise),
        noisy_because=noise,
        engines=described,
        absent=tuple(absent),
        workloads=tuple(results),
    )


def _open_all(
    specs: Sequence[Spec],
    settings: Settings,
    worker: Callable[[Spec, int], Sequence[str]],
    scratch: Path,
    workers: ExitStack,
    progress: Progress,
) -> tuple[list[Running], list[Absent]]:
    engines: list[Running] = []
    absent: dict[Spec, Absent] = {}
    for spec, threads in itertools.product(specs, settings.threads):
        if spec in absent:
            continue
        name = f"{spec.runtime}:{spec.source}"
        progress(f"load {name}")
        started = time.perf_counter()
        try:
            log = scratch / f"{len(engines)}.log"
            process = WorkerProcess(worker(spec, threads), name, log)
            workers.enter_context(process)
            ready = process.ask(Load(), Ready)
        except NotThereError as reason:
            if not engines:
                raise InputError(
                    f"the baseline {name} is not there: {reason}. Put another engine first."
                ) from None
            absent[spec] = Absent(runtime=spec.runtime, source=str(spec.source), reason=str(reason))
            continue
        about = Engine(
            name=ready.name,
            runtime=spec.runtime,
            source=str(spec.source),
            precision=ready.precision,
            threads=threads,
            load_s=time.perf_counter() - started,
            cold_start_s=0.0,  # known after the first answer
            peak_rss_bytes=None,
            file_bytes=sum(path.stat().st_size for path in spec.source.iterdir() if path.is_file()),
            tokenises=ready.tokenises,
            versions=ready.versions,
            model_sha256=_model_sha256(spec.source),
        )
        engines.append(Running(process, len(engines), about))
    return engines, list(absent.values())


def _model_sha256(source: Path) -> str | None:
    if not (source / MANIFEST).is_file():
        return None
    bundle = open_bundle(source)
    return bundle.manifest.files[bundle.model_path.name].sha256


def _race_on(
    workload: Workload,
    engines: Sequence[Running],
    settings: Settings,
    scratch: Path,
    progress: Progress,
) -> tuple[Workload, list[Raced], list[Absent]]:
    """Race the engines that can do the work; those that cannot are absent from it."""
    save_work(scratch / "work.npz", workload.work)
    able, absent = [], []
    for engine in engines:
        progress(f"{workload.name}: warm up {engine.about.name}")
        try:
            able.append(_begin(engine, settings, scratch))
        except NotThereError as reason:
            about = engine.about
            absent.append(Absent(runtime=about.runtime, source=about.source, reason=str(reason)))
    if not able:
        raise InputError(f"no engine can do '{workload.name}': {absent[0].reason}.")
    _race(able, workload, settings, progress)
    return workload, able, absent


def _begin(engine: Running, settings: Settings, scratch: Path) -> Raced:
    """Hand the work over, warm up, and ask for the outputs."""
    engine.worker.ask(TakeBatches(str(scratch / "work.npz")), Done)
    warmed = engine.worker.ask(Warm(settings.warm_up_max_seconds), Measured)
    engine.worker.ask(Logits(str(scratch / "logits.npz")), Done)
    return Raced(
        engine=engine,
        warm_up=WarmUp(warmed.turn, stable=bool(warmed.stable)),
        logits=load_logits(scratch / "logits.npz"),
        rounds=[],
    )


def _race(
    engines: Sequence[Raced], workload: Workload, settings: Settings, progress: Progress
) -> None:
    """Let the engines take turns, in an order that rotates, until time and rounds are enough."""
    seconds = [0.0] * len(engines)
    done = 0
    while done < settings.min_rounds or min(seconds) < settings.min_seconds:
        progress(f"{workload.name}: round {done + 1} of {max(settings.min_rounds, done + 1)}")
        turn = _turn(workload, settings, done)
        for place in range(len(engines)):
            number = (done + place) % len(engines)
            time.sleep(PAUSE_SECONDS)
            measured = engines[number].engine.worker.ask(turn, Measured)
            engines[number].rounds.append(measured)
            seconds[number] += measured.turn.seconds
        done += 1


def _turn(workload: Workload, settings: Settings, done: int) -> TakeTurn:
    """Return one round's turn: in the server scenario new arrivals, the same for each engine."""
    seconds = settings.min_seconds / settings.min_rounds
    if workload.rate is None:
        return TakeTurn(seconds)
    count = max(1, round(workload.rate * seconds))
    due_s = arrivals("poisson", workload.rate, count, seed=settings.seed + done)
    return TakeTurn(0.0, tuple(float(due) for due in due_s))

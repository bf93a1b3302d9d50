"""What each precision costs and wins: ``python -m trainkit.bench.studies.precision race BUNDLE``.

BUNDLE is a float32 ONNX bundle of a classifier trained on TREC. Its graph is converted in every way
that docs/precision.md speaks of, and each result is scored on the 500 test questions and raced
against float32: one thread and one process each, taking turns. Writes ``precision.json``.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import click
import msgspec
import numpy as np
import onnx_ir as ir

from trainkit.bench.engines.base import Engine
from trainkit.bench.measure.environment import Environment, describe
from trainkit.bench.measure.statistics import Ratio
from trainkit.bench.race.protocol import (
    Done,
    EngineReady,
    LoadEngine,
    Measured,
    TakeBatches,
    TakeTurn,
    Warm,
    Work,
    save_work,
)
from trainkit.bench.race.worker import speak
from trainkit.bench.race.worker_process import WorkerProcess
from trainkit.console import steps
from trainkit.data.columns import Columns
from trainkit.data.splits import load
from trainkit.export.precision.calibration import calibrate
from trainkit.export.precision.fp16 import to_fp16
from trainkit.export.precision.int8 import to_int8
from trainkit.export.precision.int8_settings import Int8Settings
from trainkit.serve.bundle import BundleFiles, open_bundle
from trainkit.serve.classifier import Classifier
from trainkit.serve.encoding import Batch
from trainkit.serve.files import pretty_json, write_atomically
from trainkit.serve.onnx_session import onnx_runner
from trainkit.serve.types import FloatArray

__all__ = ["PrecisionFigures", "Variant", "main", "markdown"]

RESULTS = Path("bench/results/precision.json")
CALIBRATION_TEXTS = 256
BATCH_SIZES = (32, 1)
ALONE_TEXTS = 100  # for batch 1, as many as take the time of a pass at batch 32
ROUNDS = 15
WARM_UP_SECONDS = 5.0
TURN_SECONDS = 0.5

# The rows of docs/precision.md with dynamic scales, unsigned weights, one scale per weight or other
# embeddings are figures of an earlier version, which had switches for these.
VARIANTS: dict[str, Int8Settings | None] = {
    "fp32": None,
    "fp16, computed in fp32 on the CPU": None,
    "per token": Int8Settings(activations="per token"),
    "per token, 7-bit weights": Int8Settings(activations="per token", weight_bits=7),
    "static": Int8Settings(activations="static"),
    "static, 99.99 % of values": Int8Settings(activations="static", percentile=99.99),
    "static, 99.9 % of values": Int8Settings(activations="static", percentile=99.9),
}


class Variant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One precision beside float32.

    ``rms`` and ``max_abs`` are differences of logits. ``alone_labels`` counts the labels that
    change when each text is classified alone instead of among 32, ``alone_max_abs`` the largest
    change of a logit. ``speed`` is the ratio of texts a second, at batches of 32 and of 1; its
    samples are ``seconds``, one a round, for as many passes as the round had.
    """

    name: str
    settings: dict[str, Any] | None
    size_ratio: float
    accuracy: float
    label_agreement: float
    rms: float
    max_abs: float
    alone_labels: int
    alone_max_abs: float
    speed: dict[str, Ratio]
    seconds: dict[str, tuple[float, ...]]


class PrecisionFigures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of ``precision.json``."""

    schema: str
    command: tuple[str, ...]
    environment_before: Environment
    environment_after: Environment
    texts: int
    spread: float
    variants: tuple[Variant, ...]


class _Texts(NamedTuple):
    texts: list[str]
    labels: tuple[int, ...]
    calibration: list[Batch]


def _texts(bundle: BundleFiles, trec: Path) -> _Texts:
    splits = load(trec, Columns())
    encoder = bundle.encoder()
    rows = encoder.tokens([example.text for example in splits.train[:CALIBRATION_TEXTS]])
    return _Texts(
        [example.text for example in splits.test],
        tuple(bundle.manifest.labels.index(example.label) for example in splits.test),
        [encoder.pad(rows[start : start + 32]) for start in range(0, len(rows), 32)],
    )


def _write(name: str, settings: Int8Settings | None, fp32: Path, path: Path, texts: _Texts) -> None:
    model = ir.load(fp32)
    if settings is not None:
        static = settings.activations == "static"
        ranges = (
            calibrate(model, texts.calibration, path.parent, settings.percentile) if static else {}
        )
        to_int8(model, settings, ranges)
    elif name != "fp32":
        to_fp16(model)
    ir.save(model, path)


class _Scored(NamedTuple):
    together: FloatArray
    alone: FloatArray


def _score(bundle: BundleFiles, path: Path, texts: _Texts) -> _Scored:
    run = onnx_runner(path, threads=1)
    together, alone = (
        Classifier(bundle.encoder(), run, bundle.manifest.labels, batch_size=size).logits(
            texts.texts
        )
        for size in BATCH_SIZES
    )
    return _Scored(together, alone)


def _race(
    paths: Sequence[Path], batches: Sequence[Batch], scratch: Path
) -> list[tuple[float, ...]]:
    """Return each model's seconds a pass, one a round; the order of a round rotates."""
    save_work(scratch / "work.npz", Work(list(batches), []))
    seconds: list[list[float]] = [[] for _ in paths]
    with ExitStack() as stack:
        workers = []
        for path in paths:
            command = [
                sys.executable,
                "-P",
                "-m",
                "trainkit.bench.studies.precision",
                "worker",
                str(path),
            ]
            worker = stack.enter_context(
                WorkerProcess(command, path.stem, path.with_suffix(".log"))
            )
            worker.ask(LoadEngine(), EngineReady)
            worker.ask(TakeBatches(str(scratch / "work.npz")), Done)
            worker.ask(Warm(WARM_UP_SECONDS), Measured)
            workers.append(worker)
        for done in range(ROUNDS):
            for place in range(len(workers)):
                number = (done + place) % len(workers)
                time.sleep(0.03)  # threads of the last one spin on for some milliseconds
                turn = workers[number].ask(TakeTurn(TURN_SECONDS), Measured).turn
                seconds[number].append(turn.seconds / len(turn.batch_s))
    return [tuple(one) for one in seconds]


def measure(bundle: BundleFiles, trec: Path) -> PrecisionFigures:
    """Convert, score and race every variant."""
    before, texts = describe(), _texts(bundle, trec)
    with tempfile.TemporaryDirectory(prefix="trainkit-bench-") as folder, steps() as told:
        scratch = Path(folder)
        paths = [scratch / f"{number}.onnx" for number in range(len(VARIANTS))]
        scored = []
        for (name, settings), path in zip(VARIANTS.items(), paths, strict=True):
            told(name)
            _write(name, settings, bundle.model_path, path, texts)
            scored.append(_score(bundle, path, texts))
        rows, pad = bundle.encoder().tokens(texts.texts), bundle.encoder().pad
        raced: dict[str, list[tuple[float, ...]]] = {}
        for size in BATCH_SIZES:
            told(f"race, batches of {size}")
            some = rows if size > 1 else rows[:ALONE_TEXTS]
            batches = [pad(some[start : start + size]) for start in range(0, len(some), size)]
            raced[str(size)] = _race(paths, batches, scratch)
        variants = tuple(
            _variant(number, paths, scored, texts, raced) for number in range(len(paths))
        )
    centred = scored[0].together - scored[0].together.mean(axis=0)
    return PrecisionFigures(
        schema="trainkit-precision/1",
        command=(
            "python",
            "-m",
            "trainkit.bench.studies.precision",
            "race",
            "BUNDLE",
            "--trec",
            "TREC",
        ),
        environment_before=before,
        environment_after=describe(),
        texts=len(texts.texts),
        spread=float(np.sqrt(np.mean(np.square(centred)))),
        variants=variants,
    )


def _variant(
    number: int,
    paths: Sequence[Path],
    scored: Sequence[_Scored],
    texts: _Texts,
    raced: dict[str, list[tuple[float, ...]]],
) -> Variant:
    name = list(VARIANTS)[number]
    found, expected = scored[number], scored[0].together
    labels = found.together.argmax(axis=1)
    return Variant(
        name=name,
        settings=msgspec.to_builtins(VARIANTS[name]),
        size_ratio=paths[number].stat().st_size / paths[0].stat().st_size,
        accuracy=float((labels == np.array(texts.labels)).mean()),
        label_agreement=float((labels == expected.argmax(axis=1)).mean()),
        rms=float(np.sqrt(np.mean(np.square(found.together - expected)))),
        max_abs=float(np.abs(found.together - expected).max()),
        alone_labels=int((labels != found.alone.argmax(axis=1)).sum()),
        alone_max_abs=float(np.abs(found.together - found.alone).max()),
        speed={size: Ratio.of_rounds(one[0], one[number]) for size, one in raced.items()},
        seconds={size: one[number] for size, one in raced.items()},
    )


def markdown(figures: PrecisionFigures) -> str:
    """Lay out the variants as the table of docs/precision.md."""
    lines = [
        "| precision | size | TREC-6 test | same labels | error, rms | labels that change alone "
        "| speed, batch 32 | batch 1 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in figures.variants:
        speeds = (
            f"{one.speed[str(size)].median:.2f} ({one.speed[str(size)].low:.2f} to "
            f"{one.speed[str(size)].high:.2f})"
            for size in BATCH_SIZES
        )
        lines.append(
            f"| {one.name} | {100 * one.size_ratio:.1f} % | {100 * one.accuracy:.1f} % "
            f"| {100 * one.label_agreement:.1f} % | {one.rms:.3f} | {one.alone_labels} "
            f"| {' | '.join(speeds)} |"
        )
    return "\n".join(lines)


@click.group()
def main() -> None:
    """Measure the precisions of one model."""


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
def worker(path: Path) -> None:
    """Serve one model file to the race, on one thread."""
    speak(lambda: Engine(path.stem, onnx_runner(path, threads=1)))


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--trec", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def race(bundle: Path, trec: Path, out: Path) -> None:
    """Convert BUNDLE in every way, and write what came of it."""
    figures = measure(open_bundle(bundle), trec)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, pretty_json(figures))
    click.echo(markdown(figures))


if __name__ == "__main__":
    main()

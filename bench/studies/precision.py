"""What each precision costs and gains: one float32 ONNX bundle, converted in every way.

Each variant is scored on the 500 test questions of TREC and raced against float32 on one thread.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click
import msgspec
import numpy as np
import onnx_ir as ir

from trainkit import tables
from trainkit.bench.engines.base import Engine
from trainkit.bench.engines.registry import Spec
from trainkit.bench.files import ReportHead
from trainkit.bench.measure.statistics import Ratio
from trainkit.bench.race import runner
from trainkit.bench.race.worker import speak
from trainkit.bench.report.tables import ratio_text
from trainkit.bench.result import BenchmarkSettings
from trainkit.bench.studies.study import Session, Study, head
from trainkit.data.columns import Columns
from trainkit.data.splits import Splits, load
from trainkit.export.precision.calibration import calibrate
from trainkit.export.precision.fp16 import to_fp16
from trainkit.export.precision.int8 import to_int8
from trainkit.export.precision.int8_settings import Int8Settings
from trainkit.serve.bundle import BundleFiles, open_bundle
from trainkit.serve.classifier import Classifier
from trainkit.serve.encoding import Batch
from trainkit.serve.onnx_session import onnx_runner
from trainkit.serve.types import FloatArray
from trainkit.tables import Table

CALIBRATION_TEXTS = 256
BATCH_SIZES = (32, 1)
ALONE_TEXTS = 100  # for batches of 1, so that a pass takes as long as one of batches of 32
ROUNDS = 15
WARM_UP_SECONDS = 5.0
TURN_SECONDS = 0.5
PROGRAM = "import sys; from trainkit.bench.studies.precision import work; work(sys.argv[1])"

# The rows of docs/precision.md with dynamic scales, unsigned weights, one scale per weight or other
# embeddings are figures of an earlier version, which had switches for these.
VARIANTS: dict[str, Int8Settings | None] = {
    "fp32": None,
    "fp16, computed in fp32 on the CPU": None,
    "per token": Int8Settings(activations="per token"),
    "per token, 7-bit weights": Int8Settings(activations="per token", weight_bits=7),
    "static": Int8Settings(activations="static"),
    "static, 99.99% of values": Int8Settings(activations="static", percentile=99.99),
    "static, 99.9% of values": Int8Settings(activations="static", percentile=99.9),
}


class Variant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One precision beside float32.

    ``rms`` and ``max_abs`` are differences of logits. ``alone_labels`` counts the labels that
    change when each text is classified alone instead of among 32, ``alone_max_abs`` the largest
    change of a logit. ``speed`` is the ratio of texts/s, at batches of 32 and of 1.
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


class PrecisionFigures(ReportHead, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All variants of one model; ``logit_std`` is the deviation of the float32 logits."""

    schema: Literal["trainkit-precision/2"] = "trainkit-precision/2"
    texts: int
    logit_std: float
    variants: tuple[Variant, ...]


class _Scored(NamedTuple):
    together: FloatArray
    alone: FloatArray


def _write(
    name: str, settings: Int8Settings | None, fp32: Path, path: Path, batches: Sequence[Batch]
) -> None:
    model = ir.load(fp32)
    if settings is not None:
        static = settings.activations == "static"
        ranges = calibrate(model, batches, path.parent, settings.percentile) if static else {}
        to_int8(model, settings, ranges)
    elif name != "fp32":
        to_fp16(model)
    ir.save(model, path)


def _score(bundle: BundleFiles, path: Path, texts: Sequence[str]) -> _Scored:
    run = onnx_runner(path, threads=1)
    together, alone = (
        Classifier(bundle.encoder(), run, bundle.manifest.labels, batch_size=size).logits(texts)
        for size in BATCH_SIZES
    )
    return _Scored(together, alone)


@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--trec", type=click.Path(path_type=Path), required=True)
def measure(session: Session, bundle: Path, trec: Path) -> PrecisionFigures:
    """Convert BUNDLE, a float32 ONNX bundle trained on TREC, in every way."""
    opened, splits = open_bundle(bundle), load(trec, Columns())
    encoder = opened.encoder()
    texts = [example.text for example in splits.test]
    rows = encoder.tokens([example.text for example in splits.train[:CALIBRATION_TEXTS]])
    batches = [encoder.pad(rows[start : start + 32]) for start in range(0, len(rows), 32)]
    with tempfile.TemporaryDirectory(prefix="trainkit-bench-") as folder:
        paths = {name: Path(folder) / f"{number}.onnx" for number, name in enumerate(VARIANTS)}
        scored = {}
        for name, path in paths.items():
            session(name)
            _write(name, VARIANTS[name], opened.model_path, path, batches)
            scored[name] = _score(opened, path, texts)
        speeds = {str(size): _race(opened, paths, splits, size, session) for size in BATCH_SIZES}
        sizes = {name: path.stat().st_size for name, path in paths.items()}
    labels = np.array([opened.manifest.labels.index(example.label) for example in splits.test])
    fp32 = scored["fp32"].together
    return PrecisionFigures(
        **head(),
        texts=len(texts),
        logit_std=float(np.sqrt(np.mean(np.square(fp32 - fp32.mean(axis=0))))),
        variants=tuple(
            _variant(
                name,
                sizes[name] / sizes["fp32"],
                scored[name],
                fp32,
                labels,
                {size: found[name] for size, found in speeds.items()},
            )
            for name in VARIANTS
        ),
    )


def _race(
    bundle: BundleFiles, paths: dict[str, Path], splits: Splits, size: int, session: Session
) -> dict[str, Ratio]:
    """Return each variant's speed relative to float32, in batches of ``size``."""

    def command(spec: Spec, threads: int) -> list[str]:
        return [sys.executable, "-P", "-c", PROGRAM, str(paths[spec.runtime])]

    result = runner.run(
        [Spec(name, bundle.folder) for name in paths],
        splits.test if size > 1 else splits.test[:ALONE_TEXTS],
        BenchmarkSettings(
            batch_sizes=(size,),
            threads=(1,),
            min_seconds=ROUNDS * TURN_SECONDS,
            min_rounds=ROUNDS,
            warm_up_max_seconds=WARM_UP_SECONDS,
        ),
        on_progress=session,
        worker=command,
    )
    (workload,) = result.workloads
    base = workload.speeds(workload.measurements[0])
    return {
        result.engines[one.engine].runtime: Ratio.of_rounds(workload.speeds(one), base)
        for one in workload.measurements
    }


def work(path: str) -> None:
    """Serve one model file to the race, on one thread."""
    speak(lambda: Engine(Path(path).stem, onnx_runner(Path(path), threads=1)))


def _variant(
    name: str,
    size_ratio: float,
    scored: _Scored,
    fp32: FloatArray,
    expected: Any,
    speed: dict[str, Ratio],
) -> Variant:
    labels = scored.together.argmax(axis=1)
    return Variant(
        name=name,
        settings=msgspec.to_builtins(VARIANTS[name]),
        size_ratio=size_ratio,
        accuracy=float((labels == expected).mean()),
        label_agreement=float((labels == fp32.argmax(axis=1)).mean()),
        rms=float(np.sqrt(np.mean(np.square(scored.together - fp32)))),
        max_abs=float(np.abs(scored.together - fp32).max()),
        alone_labels=int((labels != scored.alone.argmax(axis=1)).sum()),
        alone_max_abs=float(np.abs(scored.together - scored.alone).max()),
        speed=speed,
    )


def markdown(figures: PrecisionFigures) -> str:
    """Lay out one row per variant."""
    columns = (
        "precision",
        "size",
        "TREC-6 test",
        "same labels",
        "error, rms",
        "labels that change alone",
        "speed, batch 32",
        "batch 1",
    )
    rows = [
        (
            one.name,
            f"{100 * one.size_ratio:.1f}%",
            f"{100 * one.accuracy:.1f}%",
            f"{100 * one.label_agreement:.1f}%",
            f"{one.rms:.3f}",
            str(one.alone_labels),
            *(ratio_text(one.speed[str(size)]) for size in BATCH_SIZES),
        )
        for one in figures.variants
    ]
    return tables.markdown(Table(columns, rows))


STUDY = Study("precision", PrecisionFigures, measure, markdown)

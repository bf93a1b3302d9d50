"""The project's own figures on TREC, made by one command: ``make figures``.

Trains each kind of model on ``train_5500.label``, scores it once on ``TREC_10.label``, exports it
to both formats with all its test labels unchanged, and measures start-up and throughput. Writes
``trec.json`` (accuracy, parity, start-up) and ``runtimes.json`` (a benchmark with raw samples).
"""

import shutil
import sys
import time
from pathlib import Path

import click
import msgspec

from trainkit.bench import cold_start, race
from trainkit.bench import result as report
from trainkit.bench.cold_start import ColdStart, HelpTime
from trainkit.bench.engines import Spec
from trainkit.bench.environment import Environment, describe
from trainkit.bench.tables import markdown
from trainkit.console import TrainingBar, stderr, steps
from trainkit.data.columns import Columns
from trainkit.data.splits import Splits, load
from trainkit.export.export import export_all, target
from trainkit.export.model_file import Settings
from trainkit.export.source import open_source
from trainkit.models.config import Kind
from trainkit.one_sentence import OneSentence
from trainkit.serve.bundle import Format
from trainkit.serve.cores import usable_cores
from trainkit.serve.files import pretty_json, write_atomically
from trainkit.trainer.config import DEFAULTS, TrainConfig
from trainkit.trainer.run import ModelChoice, start

__all__ = ["Figures", "accuracy_markdown", "load_figures", "main", "start_markdown"]

RESULTS = Path("bench/results")
BACKBONES: dict[Kind, str | None] = {"simple": None, "prefix": "minilm", "finetune": "minilm"}
FORMATS: tuple[Format, ...] = ("onnx", "torchscript")  # what the README shows
QUESTION = "How far is it from Denver to Aspen?"


class ExportFigures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One exported format: its parity on the matrix, and on the 500 test questions."""

    format: str
    parity_cases: int
    largest_difference: float
    same_test_labels: int
    accuracy: float


class ModelFigures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of model: how it was trained, and what it reached."""

    kind: str
    backbone: str | None
    training: TrainConfig
    trained_parameters: int
    seconds: float
    best_epoch: int
    valid_accuracy: float
    test_accuracy: float
    test_macro_f1: float
    exports: tuple[ExportFigures, ...]


class Figures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of ``trec.json``. Accuracies are shares of the 500 official test questions."""

    schema: str
    command: tuple[str, ...]
    environment: Environment
    test_questions: int
    models: tuple[ModelFigures, ...]
    start_to_first_answer: ColdStart
    help: HelpTime


@click.command(cls=OneSentence)
@click.option("--trec", type=click.Path(path_type=Path), required=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/figures"))
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(trec: Path, work: Path, out: Path) -> None:
    """Reproduce the figures from the two official TREC files in the folder TREC."""
    splits = load(trec, Columns())
    shutil.rmtree(work, ignore_errors=True)  # this program's own, from its last time
    models = tuple(measure(kind, splits, work / kind) for kind in BACKBONES)
    onnx = work / "prefix" / "onnx"
    figures = Figures(
        schema="trainkit-figures/1",
        command=("python", "-m", "trainkit.bench.figures", "--trec", "TREC"),
        environment=describe(),
        test_questions=len(splits.test),
        models=models,
        start_to_first_answer=cold_start.measure(onnx, QUESTION),
        help=cold_start.help_seconds(),
    )
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "trec.json", pretty_json(figures))
    with steps() as told:
        specs = [
            Spec("eager", work / "prefix"),
            Spec("torchscript", work / "prefix" / "torchscript"),
            Spec("onnx", onnx),
        ]
        settings = report.Settings(threads=(usable_cores(),))
        command = ("make", "figures")
        result = race.run(
            specs, splits.test, settings, data="TREC test", progress=told, command=command
        )
    report.save(result, out / "runtimes.json")
    click.echo(f"{accuracy_markdown(figures)}\n\n{markdown(result)}")


def measure(kind: Kind, splits: Splits, folder: Path) -> ModelFigures:
    """Train, score and export one kind of model with its default settings."""
    backbone, config = BACKBONES[kind], DEFAULTS[kind]
    began = time.perf_counter()
    stderr.print(f"{kind}: training")
    with TrainingBar(config.epochs) as bar:
        run = start(ModelChoice(kind=kind, backbone=backbone), splits, config, folder, bar)
    seconds = time.perf_counter() - began
    parameters = run.trained.model.parameters()
    return ModelFigures(
        kind=kind,
        backbone=backbone,
        training=config,
        trained_parameters=sum(w.numel() for w in parameters if w.requires_grad),
        seconds=seconds,
        best_epoch=run.trained.best.epoch,
        valid_accuracy=run.valid.accuracy,
        test_accuracy=run.test.accuracy,
        test_macro_f1=run.test.macro_f1,
        exports=tuple(_export(folder, splits)),
    )


def _export(folder: Path, splits: Splits) -> list[ExportFigures]:
    targets = [target(str(folder), format, Settings(), None) for format in FORMATS]
    with steps() as told:
        source = open_source(str(folder))
        exported = export_all(source, targets, data=splits.test, told=told)
    return [
        ExportFigures(
            format=bundle.manifest.format,
            parity_cases=bundle.parity.cases,
            largest_difference=bundle.parity.max_abs,
            # The export fails where a single one differs.
            same_test_labels=bundle.accuracy.count,
            accuracy=bundle.accuracy.accuracy,
        )
        for bundle in exported
        if bundle.accuracy is not None and bundle.accuracy.accuracy is not None
    ]


def accuracy_markdown(figures: Figures) -> str:
    """Lay out the accuracies and the parity of the exports."""
    lines = [
        "| model | trained parameters | TREC-6 test | ONNX: same labels, largest difference "
        "| TorchScript |",
        "|---|---:|---:|---:|---:|",
    ]
    for model in figures.models:
        exports = {export.format: export for export in model.exports}
        cells = (_cell(exports[name], figures.test_questions) for name in ("onnx", "torchscript"))
        name = f"`{model.kind}`" + (f" on {model.backbone}" if model.backbone else "")
        lines.append(
            f"| {name} | {model.trained_parameters:,} | {100 * model.test_accuracy:.1f} % "
            f"| {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def _cell(export: ExportFigures, questions: int) -> str:
    difference = f"{export.largest_difference:.0e}" if export.largest_difference else "0"
    return f"{export.same_test_labels} of {questions}, {difference}"


def start_markdown(figures: Figures) -> str:
    """Say in a sentence what start-up costs."""
    cold = figures.start_to_first_answer
    peak = f"{cold.peak_rss_bytes / 1e6:.0f} MB" if cold.peak_rss_bytes else "not measured"
    return (
        f"From process start to first answer {cold.median_s:.2f} s, {peak} resident at its peak, "
        f"torch not imported; `trainkit --help` {figures.help.median_s:.2f} s."
    )


def load_figures(path: Path) -> Figures:
    """Read ``trec.json``."""
    return msgspec.json.decode(path.read_bytes(), type=Figures)


if __name__ == "__main__":
    sys.exit(main())

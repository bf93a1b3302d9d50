"""What the models of TREC-6 give once they are exported: parity, labels, start.

Takes the models that the study ``accuracy`` trained with seed 0, and trains those that are missing.
"""

from pathlib import Path
from typing import Literal

import click
import msgspec

from trainkit import tables
from trainkit.bench.files import ReportHead
from trainkit.bench.studies import accuracy, cold_start
from trainkit.bench.studies.accuracy import AccuracyJob, jobs_of, train_all
from trainkit.bench.studies.cold_start import ColdStart, HelpTime
from trainkit.bench.studies.study import Session, Study, head
from trainkit.data.splits import Splits, load
from trainkit.export.bundle_writer import export_all, make_target
from trainkit.export.settings import ExportSettings
from trainkit.export.source import open_source
from trainkit.serve.formats import Format
from trainkit.tables import Table
from trainkit.trainer import checkpoint

MEASURED = "prefix"  # the kind whose start-up and throughput are measured
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
    """One kind of model: which one was trained, and its exports."""

    kind: str
    backbone: str | None
    weights_sha256: str
    exports: tuple[ExportFigures, ...]


class TrecFigures(ReportHead, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The exports of all models; accuracies are shares of the 500 official test questions."""

    schema: Literal["trainkit-figures/3"] = "trainkit-figures/3"
    test_questions: int
    models: tuple[ModelFigures, ...]
    start_to_first_answer: ColdStart
    help: HelpTime


@click.option("--data", type=click.Path(path_type=Path), default="data", show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default="runs/accuracy", show_default=True)
def measure(session: Session, data: Path, work: Path) -> TrecFigures:
    """Measure the models of TREC-6, whose official files are in the folder DATA/trec."""
    task = accuracy.TASKS[0]
    splits = load(data / task.folder, task.columns, seed=0)
    jobs = [jobs_of(task, settings, work, 1)[0] for settings, _ in task.models]
    train_all(jobs, data, threads=1)
    started = next(job.folder for job in jobs if job.settings["model"] == MEASURED)
    return TrecFigures(
        models=tuple(measure_model(job, splits) for job in jobs),
        test_questions=len(splits.test),
        start_to_first_answer=cold_start.measure(started / "onnx", QUESTION),
        help=cold_start.help_seconds(),
        **head(),
    )


def measure_model(job: AccuracyJob, splits: Splits) -> ModelFigures:
    """Export what was trained; an export with other labels, or that is too far off, fails."""
    trained = checkpoint.load(job.folder).checkpoint
    return ModelFigures(
        kind=trained.model.kind,
        backbone=job.settings.get("backbone"),
        weights_sha256=trained.weights_facts.sha256,
        exports=tuple(_export(job.folder, splits)),
    )


def _export(folder: Path, splits: Splits) -> list[ExportFigures]:
    targets = [make_target(str(folder), format, ExportSettings(), None) for format in FORMATS]
    exported = export_all(open_source(str(folder)), targets, data=splits.test, force=True)
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


def parity_markdown(figures: TrecFigures) -> str:
    """Lay out what the exports gave: on the test questions, and on the parity matrix."""
    columns = (
        "TREC-6, seed 0",
        "PyTorch, ONNX and TorchScript",
        "ONNX: same labels, largest difference",
        "TorchScript",
    )
    rows = []
    for model in figures.models:
        exports = {export.format: export for export in model.exports}
        name = f"`{model.kind}`" + (f" on {model.backbone}" if model.backbone else "")
        cells = (_cell(exports[format], figures.test_questions) for format in FORMATS)
        rows.append((name, f"{100 * model.exports[0].accuracy:.1f}%", *cells))
    return tables.markdown(Table(columns, rows))


def _cell(export: ExportFigures, questions: int) -> str:
    difference = f"{export.largest_difference:.0e}" if export.largest_difference else "0"
    return f"{export.same_test_labels} of {questions}, {difference}"


def start_markdown(figures: TrecFigures) -> str:
    """Say in a sentence what start-up costs."""
    cold = figures.start_to_first_answer
    peak = f"{cold.peak_rss_bytes / 1e6:.0f} MB" if cold.peak_rss_bytes else "not measured"
    return (
        f"From process start to first answer {cold.median_s:.2f} s, {peak} resident at its peak, "
        f"torch not imported; `trainkit --help` {figures.help.median_s:.2f} s."
    )


STUDY = Study("trec", TrecFigures, measure, parity_markdown)

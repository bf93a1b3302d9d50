"""What the models of TREC-6 give once they are exported: ``make figures``.

Takes the models that ``python -m trainkit.bench.studies accuracy`` trained with seed 0 (and trains
what is not there), exports them to both formats with all labels of the test questions unchanged,
and measures start-up and throughput. Writes ``trec.json`` (parity, start-up) and ``runtimes.json``
(a benchmark with raw samples).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from trainkit.bench import result as report
from trainkit.bench.engines.registry import Spec
from trainkit.bench.measure.environment import Environment, describe
from trainkit.bench.race import runner
from trainkit.bench.report.tables import markdown
from trainkit.bench.studies import accuracy, cold_start
from trainkit.bench.studies.accuracy import Job, jobs_of, train_all
from trainkit.bench.studies.cold_start import ColdStart, HelpTime
from trainkit.cli_errors import ErrorReportingCommand
from trainkit.console import steps
from trainkit.data.splits import Splits, load
from trainkit.export.bundle_writer import export_all, make_target
from trainkit.export.settings import ExportSettings
from trainkit.export.source import open_source
from trainkit.serve.cores import usable_cores
from trainkit.serve.files import pretty_json, write_atomically
from trainkit.serve.formats import Format
from trainkit.trainer import checkpoint

__all__ = ["Figures", "load_figures", "main", "parity_markdown", "start_markdown"]

RESULTS = Path("bench/results")
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


class Figures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of ``trec.json``. Accuracies are shares of the 500 official test questions."""

    schema: str
    command: tuple[str, ...]
    environment: Environment
    test_questions: int
    models: tuple[ModelFigures, ...]
    start_to_first_answer: ColdStart
    help: HelpTime


@click.command(cls=ErrorReportingCommand)
@click.option("--data", type=click.Path(path_type=Path), default="data", show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default="runs/accuracy", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(data: Path, work: Path, out: Path) -> None:
    """Measure the models of TREC-6, whose official files are in the folder DATA/trec."""
    task = accuracy.TASKS[0]
    splits = load(data / task.folder, task.columns, seed=0)
    jobs = [jobs_of(task, settings, work, 1)[0] for settings, _ in task.models]
    train_all(jobs, data, threads=1)
    models = tuple(measure(job, splits) for job in jobs)
    measured = next(job.folder for job in jobs if job.settings["model"] == MEASURED)
    figures = Figures(
        schema="trainkit-figures/2",
        command=("python", "-m", "trainkit.bench.studies.trec", *sys.argv[1:]),
        environment=describe(),
        test_questions=len(splits.test),
        models=models,
        start_to_first_answer=cold_start.measure(measured / "onnx", QUESTION),
        help=cold_start.help_seconds(),
    )
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "trec.json", pretty_json(figures))
    with steps() as told:
        specs = [
            Spec("eager", measured),
            Spec("torchscript", measured / "torchscript"),
            Spec("onnx", measured / "onnx"),
        ]
        settings = report.BenchmarkSettings(threads=(usable_cores(),))
        command = ("make", "figures")
        result = runner.run(
            specs, splits.test, settings, data="TREC test", on_progress=told, command=command
        )
    report.save(result, out / "runtimes.json")
    click.echo(f"{parity_markdown(models, len(splits.test))}\n\n{markdown(result)}")


def measure(job: Job, splits: Splits) -> ModelFigures:
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
    with steps() as told:
        source = open_source(str(folder))
        exported = export_all(source, targets, data=splits.test, force=True, on_progress=told)
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


def parity_markdown(models: Sequence[ModelFigures], questions: int) -> str:
    """Lay out what the exports gave: on the test questions, and on the parity matrix."""
    lines = [
        "| TREC-6, seed 0 | PyTorch, ONNX and TorchScript | ONNX: same labels, largest difference "
        "| TorchScript |",
        "|---|---:|---:|---:|",
    ]
    for model in models:
        exports = {export.format: export for export in model.exports}
        cells = (_cell(exports[name], questions) for name in FORMATS)
        name = f"`{model.kind}`" + (f" on {model.backbone}" if model.backbone else "")
        right = f"{100 * model.exports[0].accuracy:.1f} %"
        lines.append(f"| {name} | {right} | {' | '.join(cells)} |")
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

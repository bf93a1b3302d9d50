"""What a person sees on the terminal: bars on standard error, tables from reports."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from trainkit.tables import Table

if TYPE_CHECKING:
    from trainkit.export.parity import ParityReport
    from trainkit.serve.bundle import Manifest, Tensor
    from trainkit.trainer.callbacks import Epoch
    from trainkit.trainer.metrics import Evaluation
    from trainkit.trainer.run import RunResult

# Labels and paths are the user's: "[/x]" in one is no markup.
stdout = Console(markup=False)
stderr = Console(stderr=True, markup=False)


class TrainingBar:
    """A bar with loss, accuracy and time left; one line an epoch stays above it."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.2f}  acc {task.fields[accuracy]:.1f}%"),
            TimeRemainingColumn(),
            console=stderr,
            transient=True,
            disable=not stderr.is_terminal,
        )
        self.task = self.bar.add_task("Training", total=None, loss=float("nan"), accuracy=0.0)

    def __enter__(self) -> "TrainingBar":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def step(self, epoch: int, done: int, total: int, loss: float, accuracy: float) -> None:
        """Move the bar: one optimizer step was made."""
        self.bar.update(
            self.task,
            description=f"Epoch {epoch}/{self.epochs}",
            completed=(epoch - 1) * total + done,
            total=self.epochs * total,
            loss=loss,
            accuracy=100 * accuracy,
        )

    def epoch(self, result: "Epoch") -> None:
        """Print the epoch's line."""
        stderr.print(f"{result}{'  *' if result.best else ''}", highlight=False, soft_wrap=True)

    def refit(self) -> None:
        """Report that training starts again."""
        stderr.print("Again, on train and validation together:")


@contextmanager
def steps() -> Iterator[Callable[[str], None]]:
    """Show what is being done, in one line that is gone afterwards; nothing off a terminal."""
    with stderr.status("Starting") as status:
        yield lambda step: status.update(Text(step))


def parity_table(report: "ParityReport") -> Table:
    """Lay out the worst cases of a parity report."""
    rows = [
        (
            result.case,
            "ok" if result.passed else "FAILED",
            "-" if result.max_abs is None else f"{result.max_abs:.1e}",
            "-" if result.max_rel is None else f"{result.max_rel:.1e}",
            result.reason,
        )
        for result in report.worst
    ]
    return Table(
        columns=("case", "", "largest difference", "relative", "why it failed"),
        rows=rows,
        title=f"Worst of {report.cases} parity cases ({report.precision})",
        numeric=False,
        styles={place: "bad" for place, one in enumerate(report.worst) if not one.passed},
    )


def stage_table(manifest: "Manifest") -> Table:
    """Lay out what was done to the model, and how far each stage is from the source."""
    rows = [
        (stage["name"], *_measured(stage), "; ".join(stage["declined"]))
        for stage in manifest.stages
    ]
    finished = {"rewritten": 0, "parity": manifest.parity}
    return Table(
        columns=("stage", "places", "cases", "largest difference", "labels agree", "why not"),
        rows=[*rows, ("finished bundle", *_measured(finished), "")],
        title=f"{manifest.format}, {manifest.precision}",
        numeric=False,
    )


def _measured(stage: dict[str, Any]) -> tuple[str, str, str, str]:
    places, parity = str(stage["rewritten"] or "-"), stage["parity"]
    if parity is None:
        return places, "-", "-", "-"
    agreement = f"{100 * parity['label_agreement']:.2f}%"
    return places, str(parity["cases"]), f"{parity['max_abs']:.1e}", agreement


def manifest_table(manifest: "Manifest") -> Table:
    """Lay out what a bundle is and where it came from."""
    source, parity = manifest.source, manifest.parity
    opset = f", opset {manifest.opset}" if manifest.opset else ""
    rows = {
        "format": f"{manifest.format}, {manifest.precision}{opset}",
        "model": " on ".join(filter(None, (source["kind"], source["backbone"]))),
        "problem": manifest.problem_type,
        "labels": ", ".join(manifest.labels),
        "inputs": ", ".join(_tensor(tensor) for tensor in manifest.inputs),
        "outputs": ", ".join(_tensor(tensor) for tensor in manifest.outputs),
        "pooling": manifest.pooling,
        "max length": f"{manifest.max_length} tokens",
        "layout": (source["padded_because"] and f"padded: {source['padded_because']}") or "packed",
        "parity": f"{parity['cases']} cases, largest difference {parity['max_abs']:.1e}, "
        f"labels agree on {100 * parity['label_agreement']:.2f}% of {parity['rows']} rows",
        "independence": ", ".join(
            f"{check['name']} {'kept' if check['applies'] else 'not: ' + check['reason']}"
            for check in manifest.independence
        ),
        "temperature": _temperature(manifest.temperature),
        "accuracy": _accuracy(manifest.accuracy),
        "made with": ", ".join(f"{name} {version}" for name, version in source["versions"].items()),
        "files": ", ".join(
            f"{name} {facts.size_bytes / 1e6:.1f} MB" for name, facts in manifest.files.items()
        ),
    }
    rows |= {f"note {number}": note for number, note in enumerate(manifest.notes, start=1)}
    return Table(columns=("", ""), rows=[*rows.items()], numeric=False)


def _temperature(temperature: object) -> str:
    return f"{temperature:.3f}" if isinstance(temperature, float) else "none: plain probabilities"


def _accuracy(accuracy: dict[str, Any] | None) -> str:
    if accuracy is None:
        return "not measured: export with --data"
    agreement = f"{100 * accuracy['agreement']:.2f}% of {accuracy['count']} as its source"
    if accuracy["accuracy"] is None:
        return agreement
    return f"{100 * accuracy['accuracy']:.1f}%, {agreement}"


def _tensor(tensor: "Tensor") -> str:
    return f"{tensor.name} {tensor.dtype} ({', '.join(map(str, tensor.axes))})"


def calibration_line(run: "RunResult") -> str:
    """Say what the temperature does to the calibration error, or why there is none."""
    if run.no_temperature:
        return f"No temperature was kept: {run.no_temperature}"
    changes = (
        f"{100 * scores.raw_calibration_error:.1f}% -> {100 * scores.calibration_error:.1f}%"
        for scores in (run.valid, run.test)
    )
    return "Temperature {:.2f}; calibration error on validation {}, on test {}".format(
        run.valid.temperature, *changes
    )


def evaluation_tables(evaluation: "Evaluation") -> Iterator[Table]:
    """Lay out an evaluation: totals, one row per label, and the confusions for up to 12 labels."""
    columns = ["texts", "accuracy", "macro F1", "loss", "calibration error"]
    totals = [
        str(evaluation.count),
        f"{100 * evaluation.accuracy:.1f}%",
        f"{100 * evaluation.macro_f1:.1f}%",
        f"{evaluation.loss:.3f}",
        f"{100 * evaluation.calibration_error:.1f}%",
    ]
    if evaluation.temperature != 1:
        columns.append("without temperature")
        totals.append(f"{100 * evaluation.raw_calibration_error:.1f}%")
    yield Table(columns, [totals])
    yield Table(
        columns=("label", "precision", "recall", "F1", "texts"),
        rows=[
            (
                name,
                *(f"{100 * share:.1f}%" for share in (score.precision, score.recall, score.f1)),
                str(score.count),
            )
            for name, score in evaluation.per_label.items()
        ],
    )
    names = list(evaluation.per_label)
    if len(names) <= 12:
        rows = [
            (name, *(str(count) if count else "·" for count in row))
            for name, row in zip(names, evaluation.confusion, strict=True)
        ]
        yield Table(("", *names), rows, title="rows: true label, columns: answer")

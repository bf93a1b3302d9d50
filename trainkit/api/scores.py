"""``trainkit.evaluate`` and ``trainkit.verify``."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit.api.inputs import Folder, Split, examples_of, progress
from trainkit.data.columns import Columns, Labels
from trainkit.serve.errors import InputError

if TYPE_CHECKING:
    from trainkit.api.models import Bundle, TrainedModel
    from trainkit.export.parity import ParityReport
    from trainkit.export.parity_cases import ProgressCallback
    from trainkit.trainer.metrics import Evaluation


def folder_of(source: "TrainedModel | Bundle | Folder") -> str:
    """Return the folder or the hub id of a source, as the command line takes it."""
    place: Any = getattr(source, "source", None) or getattr(source, "folder", source)
    return str(os.fspath(place))


def evaluate(
    source: "TrainedModel | Bundle | Folder",
    data: Any,
    labels: Sequence[str | int] | None = None,
    *,
    split: Split | None = None,
    base: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    trec_labels: Labels = "coarse",
    on_progress: "ProgressCallback | None" = None,
) -> "Evaluation":
    """Score a run, a bundle, a Hugging Face model or a PEFT adapter on labelled texts.

    ``data`` is as for :func:`trainkit.train`; ``split`` is taken of it, by default the test set,
    and of a single file or table all. ``base`` is the model that an adapter belongs to, if it
    moved. Returns accuracy, macro-F1, loss, calibration, scores per label and the confusion matrix.
    """
    from trainkit.export.runtimes import open_classifier
    from trainkit.trainer.metrics import evaluate as score
    from trainkit.trainer.run_folder import check_own_test

    folder = folder_of(source)
    if isinstance(data, str | os.PathLike):
        check_own_test(Path(folder), os.fspath(data), split)
    columns = Columns(trec_labels, text_column, label_column)
    with progress(on_progress) as report:
        examples = examples_of(data, labels, columns, split, folder)
        report(f"open {folder}")
        opened = getattr(source, "classifier", None)
        classifier = opened() if opened else open_classifier(Path(folder), base)
        if classifier.problem_type != "single_label_classification":
            raise InputError(
                f"{folder} does {classifier.problem_type}, and evaluate scores one label per text; "
                "compare its outputs with trainkit verify."
            )
        report(f"classify {len(examples)} texts")
        logits = classifier.logits([example.text for example in examples])
    expected = [example.label for example in examples]
    return score(logits, expected, classifier.labels, classifier.temperature)


def verify(
    bundle: "Bundle | Folder",
    against: "TrainedModel | Folder | None" = None,
    *,
    base: str | None = None,
    on_progress: "ProgressCallback | None" = None,
) -> "ParityReport":
    """Run a bundle over its parity matrix on this machine; the report's ``passed`` is the verdict.

    The reference is the logits that the bundle keeps from its export, which needs no torch, or what
    the model ``against`` computes now. ``base`` is the model that an adapter belongs to, if it
    moved.
    """
    from trainkit.export.verify import verify as repeat

    source = None if against is None else folder_of(against)
    with progress(on_progress) as report:
        return repeat(Path(folder_of(bundle)), source, base, report)

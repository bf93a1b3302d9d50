"""What training and exporting give: a run, an opened model, a bundle."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from trainkit.api.inputs import Folder, Split, examples_of, progress
from trainkit.api.option_types import ExportOptions
from trainkit.api.scores import evaluate, verify
from trainkit.api.signatures import takes_fields
from trainkit.data.columns import Columns, Labels
from trainkit.export.settings import ExportSettings
from trainkit.serve.errors import InputError
from trainkit.serve.formats import Format

if TYPE_CHECKING:
    from trainkit.data.readers import Example
    from trainkit.export.bundle_writer import ExportFormat, ExportResult
    from trainkit.export.parity import ParityReport
    from trainkit.export.parity_cases import ProgressCallback
    from trainkit.export.source import ExportSource
    from trainkit.serve.bundle import Manifest
    from trainkit.serve.classifier import Classifier
    from trainkit.trainer.metrics import Evaluation
    from trainkit.trainer.run import RunResult


class TrainedModel:
    """A classifier that can be scored and exported: a run, a Hugging Face model or an adapter.

    Made by :func:`open_model`; it is loaded when it is first needed, and then kept.
    """

    def __init__(
        self,
        source: Folder,
        *,
        base: str | None = None,
        max_length: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.source = os.fspath(source)
        self._how: dict[str, Any] = {
            "base": base,
            "max_length": max_length,
            "trust_remote_code": trust_remote_code,
        }
        self._opened: ExportSource | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r})"

    def load(self) -> "ExportSource":
        """Load the model in PyTorch; InputError if its files are missing or damaged."""
        if self._opened is None:
            from trainkit.export.source import open_source

            self._opened = open_source(self.source, **self._how)
        return self._opened

    def classifier(self) -> "Classifier":
        """Return a function from texts to predictions that computes in PyTorch."""
        return self.load().classifier()

    def evaluate(
        self, data: Any, labels: Sequence[str | int] | None = None, **options: Any
    ) -> "Evaluation":
        """Score it on labelled texts; the options are those of :func:`evaluate`."""
        return evaluate(self, data, labels, **options)

    @takes_fields(ExportSettings, without=("format",))
    def export(
        self,
        format: Format = "onnx",
        *,
        out: Folder | None = None,
        data: Any = None,
        labels: Sequence[str | int] | None = None,
        split: Split | None = None,
        force: bool = False,
        text_column: str | None = None,
        label_column: str | None = None,
        trec_labels: Labels = "coarse",
        on_progress: "ProgressCallback | None" = None,
        **options: Unpack[ExportOptions],
    ) -> "Bundle":
        """Export to a bundle that was verified to compute the same, and return it.

        ``format`` is onnx, torchscript, pt2 or aoti. ``out`` is the bundle's folder, by default in
        the run's folder, or under exports/. ``data`` are labelled texts, as for :func:`train`, on
        which labels and accuracy must survive; int8 needs them. ``force`` replaces a bundle that
        exists, once the new one has passed.

        Raises ParityError (a CheckFailedError) if the export computes something else.
        """
        columns = Columns(trec_labels, text_column, label_column)
        (made,) = self.export_all(
            [format],
            ExportSettings(**options),
            out=out,
            examples=examples_of(data, labels, columns, split, self.source),
            force=force,
            on_progress=on_progress,
        )
        return Bundle(made.folder)

    def export_all(
        self,
        formats: Sequence["ExportFormat"],
        settings: ExportSettings,
        *,
        out: Folder | None = None,
        examples: Sequence["Example"] = (),
        force: bool = False,
        on_progress: "ProgressCallback | None" = None,
    ) -> "list[ExportResult]":
        """Export to several formats, whose reference outputs are computed once."""
        from trainkit.export import bundle_writer

        folder = None if out is None else Path(out)
        targets = [
            bundle_writer.make_target(self.source, name, settings, folder) for name in formats
        ]
        with progress(on_progress) as report:
            report(f"load {self.source}")
            return bundle_writer.export_all(
                self.load(), targets, data=examples, force=force, on_progress=report
            )


class Run(TrainedModel):
    """A finished training: its folder, and the scores of the model that it kept.

    ``valid`` and ``test`` are the scores on validation and test texts, ``notes`` what the user
    should know. ``interrupted``: Ctrl-C ended the training, and the best epoch was kept.
    """

    def __init__(self, result: "RunResult") -> None:
        super().__init__(result.folder)
        self.result = result
        self.folder: Path = result.folder
        self.valid: Evaluation = result.valid
        self.test: Evaluation = result.test
        self.notes: tuple[str, ...] = result.notes
        self.interrupted: bool = result.trained.interrupted


class Bundle:
    """An exported classifier in its folder, whose files are what its manifest says."""

    def __init__(self, folder: Folder) -> None:
        from trainkit.serve.bundle import open_bundle

        self.folder = Path(folder)
        self.manifest: Manifest = open_bundle(self.folder).manifest

    def __repr__(self) -> str:
        return f"Bundle({str(self.folder)!r})"

    def classifier(self, **options: Any) -> "Classifier":
        """Return a function from texts to predictions, in the runtime of the bundle's format.

        The options are those of ``Classifier.load``, for an ONNX bundle.
        """
        if self.manifest.format == "onnx":
            from trainkit.serve.classifier import Classifier

            return Classifier.load(self.folder, **options)
        if options:
            raise InputError(
                f"{', '.join(options)} cannot be given: {self.folder} is a bundle of format "
                f"{self.manifest.format}, and only ONNX bundles take options; leave them out."
            )
        from trainkit.export.runtimes import open_classifier

        return open_classifier(self.folder)

    def evaluate(
        self, data: Any, labels: Sequence[str | int] | None = None, **options: Any
    ) -> "Evaluation":
        """Score it on labelled texts; the options are those of :func:`evaluate`."""
        return evaluate(self, data, labels, **options)

    def verify(
        self,
        against: "TrainedModel | Folder | None" = None,
        *,
        base: str | None = None,
        on_progress: "ProgressCallback | None" = None,
    ) -> "ParityReport":
        """Repeat the parity matrix on this machine; see :func:`verify`."""
        return verify(self, against, base=base, on_progress=on_progress)


def open_model(
    source: Folder,
    *,
    base: str | None = None,
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> TrainedModel:
    """Open a run's folder, a Hugging Face classifier (folder or hub id) or a PEFT adapter's folder.

    ``base`` is the model that an adapter belongs to, if it moved. ``max_length`` (tokens) truncates
    the texts of a Hugging Face model. ``trust_remote_code`` runs Python code that lies beside it.
    """
    if max_length is not None and max_length < 1:
        raise InputError(f"max_length must be at least 1, not {max_length}.")
    from trainkit.models.sources import is_kind

    for name, given in (("max_length", max_length), ("base", base)):
        if given is not None and is_kind(os.fspath(source), "run"):
            raise InputError(f"{source} is a run, which has its own {name}; leave it out.")
    model = TrainedModel(
        source, base=base, max_length=max_length, trust_remote_code=trust_remote_code
    )
    model.load()
    return model

"""Texts to predictions, whatever runtime computes the logits."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias, overload

import msgspec
import numpy as np

from trainkit.serve import bundle
from trainkit.serve.decision import FloatArray, ProblemType, probabilities
from trainkit.serve.encoding import Batch, IntArray, Text, TextEncoder
from trainkit.serve.errors import InputError

__all__ = ["Classifier", "FloatArray", "Prediction", "Runner"]

Runner: TypeAlias = Callable[[Batch], FloatArray]
"""A runtime: a padded batch of B texts to their (B, C) float32 logits."""

BATCH_SIZE = 32
PROVIDERS = ("CPUExecutionProvider",)


class Prediction(NamedTuple):
    """The most probable label of a text, and the score of every label.

    A score is a probability; those of a multi-label model need not sum to one, and a regression's
    is the value itself.
    """

    label: str
    score: float
    scores: dict[str, float]


class Classifier:
    """Call it with one text or a list; predictions come in input order.

    A text may be a pair: ``classify([("A man eats.", "Somebody eats.")])``. One pair alone goes
    into a list too.

    >>> classify = Classifier.load("runs/latest/onnx")
    >>> classify("How far is Mars?").label
    'NUM'
    """

    def __init__(
        self,
        encoder: TextEncoder,
        run: Runner,
        labels: Sequence[str],
        problem_type: ProblemType = "single_label_classification",
        batch_size: int = BATCH_SIZE,
        equal_lengths: bool = False,
    ) -> None:
        self.encoder = encoder
        self.run = run
        self.labels = tuple(labels)
        self.problem_type = problem_type
        self.equal_lengths = equal_lengths
        self.batch_size = batch_size

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        threads: int | None = None,
        providers: Sequence[str] | None = None,
        batch_size: int | None = None,
    ) -> "Classifier":
        """Open an ONNX bundle; every file's hash is checked first.

        What is None is as ``trainkit bench recommend --write`` put it into the bundle; else all
        cores, the CPU, and batches of 32. ``threads`` is the number of intra-op threads, 0 for all
        cores. ``InputError`` where the bundle is damaged, of a newer format or not ONNX, or a
        provider is missing.
        """
        from trainkit.serve.onnx_session import onnx_runner

        opened = bundle.open_bundle(Path(folder))
        if opened.manifest.format != "onnx":
            raise InputError(
                f"{folder} is a {opened.manifest.format} bundle, which needs torch; "
                "serve one made with: trainkit export --format onnx"
            )
        serving = opened.manifest.serving
        if serving is not msgspec.UNSET:
            threads = serving.threads if threads is None else threads
            providers = (serving.provider,) if providers is None else providers
        run = onnx_runner(opened.model_path, threads=threads, providers=providers or PROVIDERS)
        return cls.of_bundle(opened, run, batch_size)

    @classmethod
    def of_bundle(
        cls, opened: bundle.Bundle, run: Runner, batch_size: int | None = None
    ) -> "Classifier":
        """Put a bundle's encoder and labels around its model, which ``run`` computes.

        ``batch_size`` None is the one that the bundle recommends, else 32.
        """
        manifest = opened.manifest
        if batch_size is None:
            serving = manifest.serving
            batch_size = BATCH_SIZE if serving is msgspec.UNSET else serving.batch_size
        return cls(
            opened.encoder(),
            run,
            manifest.labels,
            manifest.problem_type,
            batch_size,
            manifest.equal_lengths,
        )

    # A str is itself a sequence of str, which no type can exclude; it is matched first.
    @overload
    def __call__(self, texts: str) -> Prediction: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, texts: Sequence[Text]) -> list[Prediction]: ...
    def __call__(self, texts: str | Sequence[Text]) -> Prediction | list[Prediction]:
        """Classify one text or many."""
        if isinstance(texts, str):
            return self([texts])[0]
        return [self._prediction(row) for row in self.predict_proba(texts)]

    def _prediction(self, row: FloatArray) -> Prediction:
        scores = dict(zip(self.labels, row.tolist(), strict=True))
        label = max(scores, key=scores.__getitem__)
        return Prediction(label, scores[label], scores)

    def predict_proba(self, texts: Sequence[Text]) -> FloatArray:
        """Return the probabilities of the labels, (N, C); see :func:`probabilities`."""
        return probabilities(self.logits(texts), self.problem_type)

    def logits(self, texts: Sequence[Text]) -> FloatArray:
        """Return the logits of N texts, (N, C), computed in batches of similar length.

        ``InputError`` names the first text that is empty.
        """
        for number, text in enumerate(texts, start=1):
            parts = (text,) if isinstance(text, str) else text
            if not any(part.strip() for part in parts):
                raise InputError(f"text {number} of {len(texts)} is empty; leave it out.")
            if any(_has_lone_surrogate(part) for part in parts):
                raise InputError(
                    f"text {number} of {len(texts)} is not Unicode (it was not UTF-8 when it was "
                    "read); decode it right, or leave it out."
                )
        rows = self.encoder.tokens(texts)
        logits = np.empty((len(rows), len(self.labels)), dtype=np.float32)
        for chosen in self._batches([len(row.ids) for row in rows]):
            logits[chosen] = self.run(self.encoder.pad([rows[i] for i in chosen]))
        return logits

    def _batches(self, lengths: Sequence[int]) -> Iterator[IntArray]:
        """Yield the numbers of texts of similar length, or of one length, ``batch_size`` each."""
        by_length = np.argsort(lengths, kind="stable")
        groups = [by_length]
        if self.equal_lengths:
            groups = np.split(by_length, np.flatnonzero(np.diff(np.take(lengths, by_length))) + 1)
        for group in groups:
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]


def _has_lone_surrogate(text: str) -> bool:
    """Tell whether ``text`` has half of a surrogate pair, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False

"""Texts to predictions, whatever runtime computes the logits."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from trainkit.serve import bundle
from trainkit.serve.encoding import Batch, TextEncoder, pad
from trainkit.serve.errors import InputError

__all__ = ["Classifier", "FloatArray", "Prediction", "Runner"]

FloatArray: TypeAlias = npt.NDArray[np.float32]
Runner: TypeAlias = Callable[[Batch], FloatArray]
"""A runtime: a padded batch of B texts to their (B, C) float32 logits."""


class Prediction(NamedTuple):
    """The most probable label of a text, and the probability of every label."""

    label: str
    score: float
    scores: dict[str, float]


class Classifier:
    """Call it with one text or a list; predictions come in input order.

    >>> classify = Classifier.load("runs/latest/onnx")
    >>> classify("How far is Mars?").label
    'NUM'
    """

    def __init__(
        self, encoder: TextEncoder, run: Runner, labels: Sequence[str], batch_size: int = 32
    ) -> None:
        self.encoder = encoder
        self.run = run
        self.labels = tuple(labels)
        self.batch_size = batch_size

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        batch_size: int = 32,
    ) -> "Classifier":
        """Open an ONNX bundle; every file's hash is checked first.

        ``threads`` is the number of intra-op threads, all cores where None. ``InputError`` where
        the bundle is damaged, of a newer format or not ONNX, or a provider is missing.
        """
        from trainkit.serve.onnx_session import onnx_runner

        opened = bundle.open_bundle(Path(folder))
        if opened.manifest.format != "onnx":
            raise InputError(
                f"{folder} is a {opened.manifest.format} bundle, which needs torch; "
                "serve one made with: trainkit export --format onnx"
            )
        run = onnx_runner(opened.model_path, threads=threads, providers=providers)
        return cls(opened.encoder(), run, opened.manifest.labels, batch_size)

    # A str is itself a sequence of str, which no type can exclude; it is matched first.
    @overload
    def __call__(self, texts: str) -> Prediction: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, texts: Sequence[str]) -> list[Prediction]: ...
    def __call__(self, texts: str | Sequence[str]) -> Prediction | list[Prediction]:
        """Classify one text or many."""
        if isinstance(texts, str):
            return self([texts])[0]
        return [self._prediction(row) for row in self.predict_proba(texts)]

    def _prediction(self, probabilities: FloatArray) -> Prediction:
        scores = dict(zip(self.labels, probabilities.tolist(), strict=True))
        label = max(scores, key=scores.__getitem__)
        return Prediction(label, scores[label], scores)

    def predict_proba(self, texts: Sequence[str]) -> FloatArray:
        """Return the softmax of the logits, (N, C)."""
        logits = self.logits(texts)
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
        probabilities: FloatArray = exponents / exponents.sum(axis=1, keepdims=True)
        return probabilities

    def logits(self, texts: Sequence[str]) -> FloatArray:
        """Return the logits of N texts, (N, C), computed in batches of similar length.

        ``InputError`` names the first text that is empty.
        """
        for number, text in enumerate(texts, start=1):
            if not text.strip():
                raise InputError(f"text {number} of {len(texts)} is empty; leave it out.")
            if _has_lone_surrogate(text):
                raise InputError(
                    f"text {number} of {len(texts)} is not Unicode (it was not UTF-8 when it was "
                    "read); decode it right, or leave it out."
                )
        rows = self.encoder.token_ids(texts)
        logits = np.empty((len(rows), len(self.labels)), dtype=np.float32)
        by_length = np.argsort([len(row) for row in rows], kind="stable")
        for start in range(0, len(rows), self.batch_size):
            chosen = by_length[start : start + self.batch_size]
            logits[chosen] = self.run(pad([rows[i] for i in chosen], self.encoder.pad_id))
        return logits


def _has_lone_surrogate(text: str) -> bool:
    """Tell whether ``text`` has half of a surrogate pair, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False

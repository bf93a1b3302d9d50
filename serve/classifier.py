"""Texts to predictions, with any runtime."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, overload

import msgspec
import numpy as np

from trainkit.serve import bundle
from trainkit.serve.encoding import Text, TextEncoder, Tokens
from trainkit.serve.errors import InputError
from trainkit.serve.forward_pool import CPU, CPU_TOKENS, MAX_TOKENS, PROVIDERS, ForwardPool
from trainkit.serve.postprocess import (
    ProblemType,
    Thresholds,
    check_temperature,
    label_thresholds,
    probabilities,
    ranking,
)
from trainkit.serve.types import FloatArray, Runner

BATCH_SIZE = 32


class Prediction(NamedTuple):
    """The most probable label of a text, and the score of every label.

    A score is a probability, or the value of a regression; those of a multi-label model need not
    sum to one. ``truncated``: the text was longer than the model's limit and was cut.
    """

    label: str
    score: float
    scores: dict[str, float]
    truncated: bool = False


class LabelScore(NamedTuple):
    """One label of a text and its probability."""

    label: str
    score: float


class Classifier:
    """Call it with one text or a list; predictions come in input order.

    A text may be a pair: ``classify([("A man eats.", "Somebody eats.")])``. One pair alone goes
    into a list too. Threads may share one: a call changes nothing in it.

    >>> classify = Classifier.load("runs/latest/onnx")
    >>> classify("How far is Mars?").label
    'NUM'

    A batch is at most ``batch_size`` rows and, padding included, ``max_tokens`` tokens; a longer
    text goes alone. Logits are divided by ``temperature``, see :mod:`trainkit.serve.calibration`.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        run: Runner,
        labels: Sequence[str],
        problem_type: ProblemType = "single_label_classification",
        batch_size: int = BATCH_SIZE,
        equal_lengths: bool = False,
        *,
        max_tokens: int = MAX_TOKENS,
        temperature: float = 1.0,
        workers: int = 1,
    ) -> None:
        given = (("batch_size", batch_size), ("max_tokens", max_tokens), ("workers", workers))
        for name, value in given:
            if value < 1:
                raise InputError(f"{name} must be at least 1, not {value}.")
        check_temperature(temperature, problem_type)
        self.encoder = encoder
        self.labels = tuple(labels)
        self.problem_type = problem_type
        self.equal_lengths = equal_lengths
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.temperature = temperature
        self._forwards = ForwardPool(run, workers)

    @property
    def run(self) -> Runner:
        """Return the model, from a padded batch to (B, C) logits."""
        return self._forwards.run

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        threads: int | None = None,
        providers: Sequence[str] | None = None,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        workers: int | None = None,
    ) -> "Classifier":
        """Open an ONNX bundle; every file's hash is checked first.

        Parameters that are None take the value that ``trainkit bench recommend --write`` put into
        the bundle; else all cores, the CPU, and batches of up to 32 rows and 512 tokens on a CPU or
        2048 elsewhere. ``threads`` is the number of intra-op threads, 0 for all cores.
        ``temperature`` None is the bundle's; 1 gives plain probabilities. With ``workers``, that
        many batches run at once, with ``threads`` each (1 if None): more texts/s for large calls,
        slower for a single text.

        Raises ``InputError`` if the bundle is damaged, of a newer format or not ONNX, has an
        operator that ONNX Runtime does not know, or a provider is missing.
        """
        from trainkit.serve.onnx_session import onnx_runner

        if threads is not None and threads < 0:
            raise InputError(f"threads must be at least 1, or 0 for all cores, not {threads}.")
        opened = bundle.open_bundle(Path(folder))
        opened.check_served()
        serving = opened.manifest.serving
        if serving is not msgspec.UNSET:
            if threads is None and workers is None:
                threads, workers = serving.threads, serving.workers
            providers = (serving.provider,) if providers is None else providers
        if threads is None and workers is not None:
            threads = 1
        providers = providers or PROVIDERS
        if max_tokens is None and providers[0] != CPU:
            max_tokens = MAX_TOKENS
        run = onnx_runner(opened.model_path, threads=threads, providers=providers)
        return cls.of_bundle(
            opened,
            run,
            batch_size,
            max_tokens=max_tokens,
            temperature=temperature,
            workers=1 if workers is None else workers,
        )

    @classmethod
    def of_bundle(
        cls,
        opened: bundle.BundleFiles,
        run: Runner,
        batch_size: int | None = None,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        workers: int = 1,
    ) -> "Classifier":
        """Build the classifier of a bundle whose model is ``run``; None is the bundle's default."""
        manifest = opened.manifest
        if max_tokens is None:
            max_tokens = CPU_TOKENS if manifest.format == "onnx" else MAX_TOKENS
        if temperature is None:
            temperature = 1.0 if manifest.temperature is msgspec.UNSET else manifest.temperature
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
            max_tokens=max_tokens,
            temperature=temperature,
            workers=workers,
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
        rows = self.tokens(texts)
        return self.predictions(rows, self.logits_of(rows))

    @overload
    async def async_call(self, texts: str) -> Prediction: ...  # type: ignore[overload-overlap]
    @overload
    async def async_call(self, texts: Sequence[Text]) -> list[Prediction]: ...
    async def async_call(self, texts: str | Sequence[Text]) -> Prediction | list[Prediction]:
        """Classify in a thread, so that the event loop goes on meanwhile.

        A call that is cancelled once it has begun computes to its end; its answer is dropped.
        """
        import asyncio  # costs memory and time, and callers that await have it already

        return await asyncio.to_thread(self, texts)

    @overload
    def top_k(self, texts: str, k: int) -> list[LabelScore]: ...  # type: ignore[overload-overlap]
    @overload
    def top_k(self, texts: Sequence[Text], k: int) -> list[list[LabelScore]]: ...
    def top_k(
        self, texts: str | Sequence[Text], k: int
    ) -> list[LabelScore] | list[list[LabelScore]]:
        """Return the ``k`` most probable labels of one text or of each, best first.

        All of them if the model has fewer. Raises ``InputError`` for a regression.
        """
        if isinstance(texts, str):
            return self.top_k([texts], k)[0]
        if self.problem_type == "regression":
            raise InputError("the model is a regression: it gives a value and no labels to rank.")
        if k < 1:
            raise InputError(f"k must be at least 1, not {k}.")
        return [ranked[:k] for ranked in self._ranked(texts)]

    @overload
    def labels_above(  # type: ignore[overload-overlap]
        self, texts: str, thresholds: Thresholds = 0.5
    ) -> list[LabelScore]: ...
    @overload
    def labels_above(
        self, texts: Sequence[Text], thresholds: Thresholds = 0.5
    ) -> list[list[LabelScore]]: ...
    def labels_above(
        self, texts: str | Sequence[Text], thresholds: Thresholds = 0.5
    ) -> list[LabelScore] | list[list[LabelScore]]:
        """Return the labels more probable than their threshold, best first: none, some or all.

        For one text or each of many; see :func:`label_thresholds`. Raises ``InputError`` if
        the model is not multi-label.
        """
        if isinstance(texts, str):
            return self.labels_above([texts], thresholds)[0]
        if self.problem_type != "multi_label_classification":
            raise InputError(
                f"thresholds are for multi-label models, and this one is {self.problem_type}; "
                "call it, or use top_k."
            )
        least = label_thresholds(thresholds, self.labels)
        return [
            [scored for scored in ranked if scored.score > least[scored.label]]
            for ranked in self._ranked(texts)
        ]

    def _ranked(self, texts: Sequence[Text]) -> list[list[LabelScore]]:
        logits = self.logits(texts)
        rows = zip(ranking(logits).tolist(), self._probabilities(logits).tolist(), strict=True)
        return [
            [LabelScore(self.labels[column], row[column]) for column in rank] for rank, row in rows
        ]

    def predict_proba(self, texts: Sequence[Text]) -> FloatArray:
        """Return the probabilities of the labels, (N, C); see :func:`probabilities`."""
        return self._probabilities(self.logits(texts))

    def _probabilities(self, logits: FloatArray) -> FloatArray:
        return probabilities(logits, self.problem_type, self.temperature)

    def logits(self, texts: Sequence[Text]) -> FloatArray:
        """Return the logits of N texts, (N, C), before any temperature.

        ``InputError`` names the first text that is empty.
        """
        return self.logits_of(self.tokens(texts))

    def tokens(self, texts: Sequence[Text]) -> list[Tokens]:
        """Encode texts: the first of the three steps of a call; ``InputError`` as in ``logits``."""
        if isinstance(texts, str):
            raise InputError("texts must be a list; for one text write [text].")
        for number, text in enumerate(texts, start=1):
            _check(text, f"text {number} of {len(texts)}")
        return self.encoder.tokens(texts)

    def logits_of(self, rows: Sequence[Tokens]) -> FloatArray:
        """Return the logits of encoded texts, (N, C), computed in batches of similar length."""
        if not rows:
            return np.empty((0, len(self.labels)), dtype=np.float32)
        return self._forwards(
            [len(row.ids) for row in rows],
            lambda part: self.encoder.pad([rows[index] for index in part]),
            max_tokens=self.max_tokens,
            batch_size=self.batch_size,
            equal_lengths=self.equal_lengths,
        )

    def predictions(self, rows: Sequence[Tokens], logits: FloatArray) -> list[Prediction]:
        """Return the predictions of N encoded texts from their (N, C) logits."""
        found = []
        # By the logits: at a high temperature two probabilities may round to the same number.
        winners = logits.argmax(axis=1).tolist()
        for tokens, row, best in zip(rows, self._probabilities(logits), winners, strict=True):
            scores = dict(zip(self.labels, row.tolist(), strict=True))
            label = self.labels[best]
            found.append(Prediction(label, scores[label], scores, tokens.truncated))
        return found


def _check(text: Text, name: str) -> None:
    """Raise ``InputError`` if ``text`` is not a text or pair that a tokenizer can encode."""
    parts = [text] if isinstance(text, str) else text
    if not isinstance(text, str):
        pair = isinstance(text, tuple | list) and len(text) == 2
        if not (pair and all(isinstance(part, str) for part in text)):
            raise InputError(f"{name} is neither a text nor a tuple of two texts.")
    if not any(part.strip() for part in parts):
        raise InputError(f"{name} is empty; leave it out.")
    if any(_has_lone_surrogate(part) for part in parts):
        raise InputError(
            f"{name} is not Unicode (it was not UTF-8 when it was read); decode it right, or leave "
            "it out."
        )


def _has_lone_surrogate(text: str) -> bool:
    """Tell whether ``text`` has half of a surrogate pair, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False

"""A run's report as one HTML page that needs nothing else: how it learned, how well, and on what.

It quotes the user's own texts, and stays in the run's folder as ``report.html``.
"""

import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from matplotlib import figure as mpl
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from trainkit import __version__
from trainkit.data.readers import Example
from trainkit.data.splits import Splits
from trainkit.html import Block, Figure, Page, Section, Shaded, render
from trainkit.serve.postprocess import probabilities
from trainkit.serve.types import FloatArray
from trainkit.svg import COLOURS, plain_axes, svg
from trainkit.tables import Table
from trainkit.trainer.callbacks import Epoch
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.metrics import BINS, Evaluation, reliability
from trainkit.trainer.run_config import ModelSpec

REPORT = "report.html"
MATRIX_LABELS = 20  # with more, a matrix is wider than a screen
SHOWN = 30  # rows of a list
TEXT_LENGTH = 400  # characters of an example that are quoted
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


class ScoredExamples(NamedTuple):
    """Some examples and the model's (N, C) logits for them."""

    name: str
    examples: Sequence[Example]
    logits: FloatArray


class Sections(NamedTuple):
    """What a report tells; ``train`` may be a part of the training texts."""

    title: str
    spec: ModelSpec
    config: TrainConfig
    splits: Splits
    labels: tuple[str, ...]
    history: Sequence[Epoch]
    best: Epoch
    train: ScoredExamples
    valid: ScoredExamples
    test: ScoredExamples
    scores: tuple[Evaluation, Evaluation]
    """Of validation and test."""
    no_temperature: str


def html(run: Sections) -> str:
    """Return the whole page."""
    _, test = run.scores
    model = " on ".join(filter(None, (run.spec.kind, run.spec.backbone)))
    summary = (
        f"{model}; best epoch {run.best.epoch} of {len(run.history)}; test accuracy "
        f"{_percent(test.accuracy)} on {test.count} texts"
    )
    settings = Table(("setting", "value"), [*_settings(run)], numeric=False)
    versions = Table(("package", "version"), [*_versions()], numeric=False)
    sections = (
        Section("Scores", [*_scores(run)]),
        Section("Learning curves", [Figure(svg(_curves(run)), CURVES)]),
        Section("Confusions on the test set", [*_confusions(test)]),
        Section("Reliability on the test set", [Figure(svg(_reliability(run)), RELIABILITY)]),
        Section("The hardest validation examples", [HARDEST, _hardest(run)]),
        Section("Likely mislabelled", [*_mislabelled(run)]),
        Section("Labels", [_labels(run)]),
        Section("Settings", [settings]),
        Section("Versions", [versions]),
    )
    return render(Page(run.title, summary, sections))


CURVES = (
    "Loss and accuracy by epoch. Those of the training texts are measured while it trains, with "
    "dropout. The dotted line is the epoch that was kept."
)
RELIABILITY = (
    "A bar is a bin of answers by how sure they are: its height is the share of right ones, and a "
    "calibrated model's end on the dashed line (Guo et al. 2017). Fainter bars hold fewer texts."
)
HARDEST = (
    "Those of the highest loss. They are of the validation set, so that the test set is not "
    "learned from."
)
MISLABELLED = (
    "The model prefers another label, with a probability at least as high as the mean one of the "
    "texts that do have that label (confident learning, Northcutt et al. 2021); the surest first. "
    "Read them: some are the model's mistakes. It was trained on the labels of the training texts, "
    "and calls only few of those wrong."
)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _scores(run: Sections) -> Iterator[Block]:
    columns = ("", "texts", "accuracy", "macro F1", "loss", "calibration error", "before")
    rows = [
        (
            name,
            str(scores.count),
            _percent(scores.accuracy),
            _percent(scores.macro_f1),
            f"{scores.loss:.3f}",
            _percent(scores.calibration_error),
            _percent(scores.raw_calibration_error),
        )
        for name, scores in zip(("validation", "test"), run.scores, strict=True)
    ]
    yield Table(columns, rows)
    if run.no_temperature:
        yield f"No temperature was kept: {run.no_temperature}"
    else:
        yield (
            f"The temperature is {run.scores[0].temperature:.3f}, fitted on the validation texts. "
            "Loss and calibration error are those with it; the last column is the calibration "
            "error before."
        )


def _curves(run: Sections) -> mpl.Figure:
    figure = mpl.Figure(figsize=(9, 3.5), layout="constrained")
    epochs = [epoch.epoch for epoch in run.history]
    for axes, name, scale in zip(
        figure.subplots(1, 2), ("loss", "accuracy"), (1, 100), strict=True
    ):
        for split, colour in zip(("train", "valid"), COLOURS, strict=False):
            values = [scale * getattr(epoch, f"{split}_{name}") for epoch in run.history]
            axes.plot(epochs, values, color=colour, marker="o", markersize=4, label=split)
        axes.axvline(run.best.epoch, color="#808080", linestyle=":", linewidth=1.2)
        axes.set_xlabel("epoch")
        axes.set_ylabel("loss" if name == "loss" else "accuracy, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
        plain_axes(axes)
    return figure


def _confusions(test: Evaluation) -> Iterator[Block]:
    names = list(test.per_label)
    if len(names) <= MATRIX_LABELS:
        rows = [
            (name, *(Shaded(str(n) if n else "·", n / max(1, sum(counts))) for n in counts))
            for name, counts in zip(names, test.confusion, strict=True)
        ]
        yield "Rows are the true labels, columns the model's answers."
        yield Table(("", *names), rows)
        return
    found = [
        (count, names[i], names[j], sum(row))
        for i, row in enumerate(test.confusion)
        for j, count in enumerate(row)
        if count and i != j
    ]
    found.sort(key=lambda one: one[0], reverse=True)
    yield (
        f"{len(names)} labels; {sum(one[0] for one in found)} of {test.count} texts were given "
        f"another label than their own. The {min(SHOWN, len(found))} most frequent of "
        f"{len(found)} such pairs:"
    )
    rows = [
        (true, answer, str(count), _percent(count / total))
        for count, true, answer, total in found[:SHOWN]
    ]
    columns = ("true label", "answer", "texts", "share of the label's texts")
    yield Table(columns, rows)


def _reliability(run: Sections) -> mpl.Figure:
    _, test = run.scores
    true = _columns(run.test.examples, run.labels)
    panels = [("before temperature", 1.0, test.raw_calibration_error)]
    if not run.no_temperature:
        name = f"with temperature {test.temperature:.2f}"
        panels.append((name, test.temperature, test.calibration_error))
    figure = mpl.Figure(figsize=(4.5 * len(panels), 4), layout="constrained")
    places = figure.subplots(1, len(panels), sharey=True, squeeze=False).flat
    for axes, (name, temperature, error) in zip(places, panels, strict=True):
        _bars(axes, run.test.logits, true, temperature)
        axes.set_title(f"{name}: error {_percent(error)}", fontsize=10)
    figure.axes[0].set_ylabel("right answers, %")
    return figure


def _bars(axes: Axes, logits: FloatArray, true: npt.NDArray[np.int64], temperature: float) -> None:
    points = reliability(logits, true, temperature)
    for i in np.flatnonzero(points.counts).tolist():
        axes.bar(
            100 * (i + 0.5) / BINS,
            100 * points.accuracies[i],
            width=90 / BINS,
            color=COLOURS[0],
            alpha=0.25 + 0.75 * float(points.counts[i] / points.counts.max()),
        )
    axes.plot([0, 100], [0, 100], color=COLOURS[1], linestyle="--", linewidth=1.2)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 105)
    axes.set_xlabel("probability of the answer, %")
    plain_axes(axes)


def _columns(examples: Sequence[Example], labels: Sequence[str]) -> npt.NDArray[np.int64]:
    number = {name: i for i, name in enumerate(labels)}
    return np.array([number[example.label] for example in examples], dtype=np.int64)


def _hardest(run: Sections) -> Table:
    scores = _probabilities(run, run.valid)
    true = _columns(run.valid.examples, run.labels)
    own = scores[np.arange(len(true)), true]
    rows = [
        (
            _quoted(run.valid.examples[i].text),
            run.labels[true[i]],
            _percent(own[i]),
            run.labels[scores[i].argmax()],
            _percent(scores[i].max()),
            f"{-np.log(max(own[i], np.finfo(np.float64).tiny)):.2f}",
        )
        for i in np.argsort(own, kind="stable")[:SHOWN].tolist()
    ]
    columns = ("text", "true label", "its probability", "answer", "its probability", "loss")
    return Table(columns, rows, numeric=False)


def _probabilities(run: Sections, scored: ScoredExamples) -> npt.NDArray[np.float64]:
    """Return (N, C) probabilities with the temperature, in float64."""
    logits = scored.logits.astype(np.float64)
    temperature = run.scores[0].temperature
    return probabilities(logits, "single_label_classification", temperature)  # type: ignore[arg-type, return-value]  # float64


def _quoted(text: str) -> str:
    return text if len(text) <= TEXT_LENGTH else f"{text[:TEXT_LENGTH]} …"


def _mislabelled(run: Sections) -> Iterator[Block]:
    yield MISLABELLED
    if len(run.train.examples) < len(run.splits.train):
        yield (
            f"Of the {len(run.splits.train)} training texts the first "
            f"{len(run.train.examples)} were looked at."
        )
    for scored in (run.valid, run.train):
        scores = _probabilities(run, scored)
        true = _columns(scored.examples, run.labels)
        found = likely_mislabelled(scores, true)
        rest = f", the first {SHOWN} of them" if len(found) > SHOWN else ""
        title = f"{scored.name}: {len(found)} of {len(true)}{rest}"
        rows = [
            (
                _quoted(scored.examples[i].text),
                run.labels[true[i]],
                _percent(scores[i, true[i]]),
                run.labels[scores[i].argmax()],
                _percent(scores[i].max()),
            )
            for i in found[:SHOWN]
        ]
        columns = ("text", "given label", "its probability", "likely label", "its probability")
        yield Table(columns, rows, title, numeric=False)


def likely_mislabelled(scores: npt.NDArray[np.float64], true: npt.NDArray[np.int64]) -> list[int]:
    """Return the rows whose given label is likely wrong, the surest first.

    ``scores`` are (N, C) probabilities, ``true`` the (N,) given columns. A row is one where the
    model prefers another label, with at least the mean probability that this label has in the rows
    that were given it: the confident joint's off-diagonal (Northcutt et al. 2021,
    https://arxiv.org/abs/1911.00068), without its calibration to the labels' frequencies.
    """
    own = scores[np.arange(len(true)), true]
    given = np.bincount(true, minlength=scores.shape[1])
    sums = np.bincount(true, weights=own, minlength=scores.shape[1])
    # A label that no row was given has no mean, and nothing is moved to it.
    least = np.where(given > 0, sums / np.maximum(given, 1), np.inf)
    answers = scores.argmax(axis=1)
    best = scores.max(axis=1)
    chosen = np.flatnonzero((answers != true) & (best >= least[answers]))
    order = np.argsort((own - best)[chosen], kind="stable")
    rows: list[int] = chosen[order].tolist()
    return rows


def _labels(run: Sections) -> Table:
    _, test = run.scores
    counts = [
        Counter(example.label for example in split)
        for split in (run.splits.train, run.splits.valid, run.splits.test)
    ]
    rows = []
    for name in run.labels:
        score = test.per_label[name]
        shares = (score.precision, score.recall, score.f1)
        rows.append((name, *(str(count[name]) for count in counts), *map(_percent, shares)))
    rows.append(("all", *(str(count.total()) for count in counts), "", "", ""))
    columns = ("label", "train", "validation", "test", "precision", "recall", "F1 on test")
    return Table(columns, rows)


def _settings(run: Sections) -> Iterator[tuple[str, str]]:
    for part in (run.spec, run.config):
        for name, value in msgspec.to_builtins(part).items():
            yield name.replace("_", " "), _words(value)


def _words(value: Any) -> str:
    return "default" if value is None else str(value)


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    yield "trainkit", __version__
    for package in PACKAGES:
        yield package, metadata.version(package)

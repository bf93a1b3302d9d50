"""A run's report as one HTML page that needs nothing else: how it learned, how well, and on what.

In go the run's settings, scores and logits; out comes ``report.html``. It quotes the user's own
texts, and stays in the run's folder.
"""

import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from importlib import metadata
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainkit import __version__
from trainkit.data.readers import Example
from trainkit.data.splits import Splits
from trainkit.drawing import COLOURS, inline_svg
from trainkit.page import document, framed, table
from trainkit.serve.postprocess import probabilities
from trainkit.serve.types import FloatArray
from trainkit.trainer.callbacks import Epoch
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.metrics import BINS, Evaluation, reliability
from trainkit.trainer.run_config import ModelSpec

__all__ = ["REPORT", "ScoredExamples", "Sections", "html", "likely_mislabelled"]

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
    return document(
        run.title,
        [
            f"<h1>{escape(run.title)}</h1>",
            f'<p class="quiet">{escape(summary)}</p>',
            "<h2>Scores</h2>",
            *_scores(run),
            "<h2>Learning curves</h2>",
            _figure(inline_svg(lambda: _curves(run), "curves"), CURVES),
            "<h2>Confusions on the test set</h2>",
            *_confusions(test),
            "<h2>Reliability on the test set</h2>",
            *_reliability(run),
            "<h2>The hardest validation examples</h2>",
            *_hardest(run),
            "<h2>Likely mislabelled</h2>",
            *_mislabelled(run),
            "<h2>Labels</h2>",
            *_labels(run),
            "<h2>Settings</h2>",
            table(("setting", "value"), _settings(run), "scroll prose"),
            "<h2>Versions</h2>",
            table(("package", "version"), _versions(), "scroll prose"),
        ],
    )


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
    return f"{100 * share:.1f} %"


def _figure(svg: str, caption: str) -> str:
    return (
        f'<figure role="group" aria-label="{escape(caption)}">{svg}'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _scores(run: Sections) -> Iterator[str]:
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
    yield table(columns, rows)
    if run.no_temperature:
        yield f"<p>No temperature was kept: {escape(run.no_temperature)}</p>"
    else:
        yield (
            f"<p>The temperature is {run.scores[0].temperature:.3f}, fitted on the validation "
            "texts. Loss and calibration error are those with it; the last column is the "
            "calibration error before.</p>"
        )


def _curves(run: Sections) -> Figure:
    figure = Figure(figsize=(9, 3.5), layout="constrained")
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
        _dress(axes)
    return figure


def _dress(axes: Axes) -> None:
    axes.grid(color="#808080", alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _confusions(test: Evaluation) -> Iterator[str]:
    names = list(test.per_label)
    if len(names) <= MATRIX_LABELS:
        yield "<p>Rows are the true labels, columns the model's answers.</p>"
        yield framed(("", *names), map(_matrix_row, names, test.confusion))
        return
    found = [
        (count, names[i], names[j], sum(row))
        for i, row in enumerate(test.confusion)
        for j, count in enumerate(row)
        if count and i != j
    ]
    found.sort(key=lambda one: one[0], reverse=True)
    yield (
        f"<p>{len(names)} labels; {sum(one[0] for one in found)} of {test.count} texts were given "
        f"another label than their own. The {min(SHOWN, len(found))} most frequent of "
        f"{len(found)} such pairs:</p>"
    )
    rows = [
        (true, answer, str(count), _percent(count / total))
        for count, true, answer, total in found[:SHOWN]
    ]
    yield table(("true label", "answer", "texts", "of that label's texts"), rows)


def _matrix_row(name: str, counts: Sequence[int]) -> str:
    total = max(1, sum(counts))
    cells = "".join(
        # The first of the plots' colours, never so dense that the count in it is hard to read.
        f'<td style="background: rgb(0 114 178 / {0.7 * count / total:.2f})">{count or "·"}</td>'
        for count in counts
    )
    return f"<tr><td>{escape(name)}</td>{cells}</tr>"


def _reliability(run: Sections) -> Iterator[str]:
    _, test = run.scores
    true = _columns(run.test.examples, run.labels)
    shown = [("before temperature", 1.0, test.raw_calibration_error)]
    if not run.no_temperature:
        name = f"with temperature {test.temperature:.2f}"
        shown.append((name, test.temperature, test.calibration_error))

    def draw() -> Figure:
        figure = Figure(figsize=(4.5 * len(shown), 4), layout="constrained")
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False).flat
        for axes, (name, temperature, error) in zip(panels, shown, strict=True):
            _bars(axes, run.test.logits, true, temperature)
            axes.set_title(f"{name}: error {_percent(error)}", fontsize=10)
        figure.axes[0].set_ylabel("right answers, %")
        return figure

    yield _figure(inline_svg(draw, "reliability"), RELIABILITY)


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
    _dress(axes)


def _columns(examples: Sequence[Example], labels: Sequence[str]) -> npt.NDArray[np.int64]:
    number = {name: i for i, name in enumerate(labels)}
    return np.array([number[example.label] for example in examples], dtype=np.int64)


def _hardest(run: Sections) -> Iterator[str]:
    scores = _probabilities(run, run.valid)
    true = _columns(run.valid.examples, run.labels)
    own = scores[np.arange(len(true)), true]
    yield f"<p>{escape(HARDEST)}</p>"
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
    yield table(columns, rows, "scroll prose")


def _probabilities(run: Sections, scored: ScoredExamples) -> npt.NDArray[np.float64]:
    """Return (N, C) probabilities with the temperature, in float64."""
    logits = scored.logits.astype(np.float64)
    temperature = run.scores[0].temperature
    return probabilities(logits, "single_label_classification", temperature)  # type: ignore[arg-type, return-value]  # float64


def _quoted(text: str) -> str:
    return text if len(text) <= TEXT_LENGTH else f"{text[:TEXT_LENGTH]} …"


def _mislabelled(run: Sections) -> Iterator[str]:
    yield f"<p>{escape(MISLABELLED)}</p>"
    if len(run.train.examples) < len(run.splits.train):
        yield (
            f"<p>Of the {len(run.splits.train)} training texts the first "
            f"{len(run.train.examples)} were looked at.</p>"
        )
    for scored in (run.valid, run.train):
        scores = _probabilities(run, scored)
        true = _columns(scored.examples, run.labels)
        found = likely_mislabelled(scores, true)
        rest = f", the first {SHOWN} of them" if len(found) > SHOWN else ""
        yield f"<h3>{scored.name}: {len(found)} of {len(true)}{rest}</h3>"
        if not found:
            continue
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
        yield table(columns, rows, "scroll prose")


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


def _labels(run: Sections) -> Iterator[str]:
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
    yield table(columns, rows)


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

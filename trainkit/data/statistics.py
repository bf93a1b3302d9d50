"""What stands in the data before anything is trained on it: splits in, counts and warnings out.

Two texts are the same *verbatim* (equal once the whitespace around them is stripped; the
published facts about TREC count so) or *folded* (equal but for case and whitespace; the splits
made by ``trainkit.data.splits`` keep such texts together).
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trainkit.data.readers import Example, first_few
from trainkit.data.splits import Splits, fold

FEW_EXAMPLES = 10
RARE = 20  # times rarer than the largest class

CountTokens = Callable[[Sequence[str]], list[int]]


@dataclass(frozen=True)
class Lengths:
    """Nearest-rank percentiles: each is the length of some text. 0 where there is none."""

    p50: int
    p95: int
    max: int


@dataclass(frozen=True)
class SameTexts:
    """One count under both definitions of "the same text"."""

    verbatim: int
    folded: int


@dataclass(frozen=True)
class SplitStatistics:
    """One split: ``classes`` has the rows of every class of train, 0 where the split has none."""

    rows: int
    classes: dict[str, int]
    words: Lengths  # separated by whitespace
    tokens: Lengths | None
    duplicate_rows: SameTexts  # rows whose text stands in an earlier row of the split


@dataclass(frozen=True)
class Statistics:
    """All splits; ``dataclasses.asdict`` makes it JSON."""

    splits: dict[str, SplitStatistics]
    overlap: dict[str, SameTexts]  # distinct texts in both, by "train/valid" and so on
    conflicting_texts: int  # folded texts that have several labels, in any split
    conflicting_labels: list[list[str]]  # the labels of the first five of them
    warnings: list[str]


def describe(splits: Splits, count_tokens: CountTokens | None = None) -> Statistics:
    """Return counts, lengths, duplicates, overlap and conflicts, with a warning for each trap.

    ``count_tokens`` gives the number of tokens of each text; without it only words are counted.
    """
    parts = {"train": splits.train, "valid": splits.valid, "test": splits.test}
    described = {
        name: _describe_split(examples, splits.label_names, count_tokens)
        for name, examples in parts.items()
    }
    overlap = {
        f"{one}/{other}": _overlap(parts[one], parts[other])
        for one, other in combinations(parts, 2)
    }
    conflicts = _conflicts([*splits.train, *splits.valid, *splits.test])
    warnings = [
        *_class_warnings(described["train"].classes),
        *_same_text_warnings(overlap, len(conflicts)),
    ]
    return Statistics(described, overlap, len(conflicts), conflicts[:5], warnings)


def _describe_split(
    examples: Sequence[Example], label_names: Sequence[str], count_tokens: CountTokens | None
) -> SplitStatistics:
    texts = [example.text for example in examples]
    counts = Counter(example.label for example in examples)
    return SplitStatistics(
        rows=len(examples),
        classes={label: counts[label] for label in label_names},
        words=_lengths([len(text.split()) for text in texts]),
        tokens=None if count_tokens is None else _lengths(count_tokens(texts)),
        duplicate_rows=SameTexts(
            verbatim=len(texts) - len(set(texts)),
            folded=len(texts) - len({fold(text) for text in texts}),
        ),
    )


def _lengths(lengths: Sequence[int]) -> Lengths:
    ordered = sorted(lengths) or [0]

    def percentile(percent: int) -> int:
        rank = -(-percent * len(ordered) // 100)  # rounded up, in integers: 0.95 is not exact
        return ordered[rank - 1]

    return Lengths(percentile(50), percentile(95), ordered[-1])


def _overlap(one: Sequence[Example], other: Sequence[Example]) -> SameTexts:
    return SameTexts(
        verbatim=len({example.text for example in one} & {example.text for example in other}),
        folded=len({fold(e.text) for e in one} & {fold(e.text) for e in other}),
    )


def _conflicts(examples: Sequence[Example]) -> list[list[str]]:
    """Return the labels of every folded text that has several, in the texts' order."""
    labels: dict[str, set[str]] = defaultdict(set)
    for example in examples:
        labels[fold(example.text)].add(example.label)
    return [sorted(of_text) for of_text in labels.values() if len(of_text) > 1]


def _class_warnings(classes: dict[str, int]) -> list[str]:
    largest = max(classes.values(), default=0)
    few = [f"{label!r} ({n})" for label, n in classes.items() if n < FEW_EXAMPLES]
    rare = [f"{label!r} ({n})" for label, n in classes.items() if n * RARE < largest]
    warnings = []
    if few:
        warnings.append(f"Under {FEW_EXAMPLES} training examples: {first_few(few)}.")
    if rare:
        warnings.append(
            f"Over {RARE} times rarer than the largest class ({largest}): {first_few(rare)}."
        )
    return warnings


def _same_text_warnings(overlap: dict[str, SameTexts], conflicts: int) -> list[str]:
    warnings = [
        f"Distinct texts in both {pair.replace('/', ' and ')}: {same.folded} "
        f"({same.verbatim} verbatim, the others differ in case or whitespace)."
        for pair, same in overlap.items()
        if same.folded
    ]
    if conflicts:
        warnings.append(f"Texts with more than one label: {conflicts}.")
    return warnings


def print_statistics(statistics: Statistics, console: Console) -> None:
    """Print the classes, then the lengths and duplicates of each split, then the warnings."""
    splits = statistics.splits
    classes = Table("class", title="Rows per class")
    for name in splits:
        classes.add_column(name, justify="right")
    for label in splits["train"].classes:
        counts = [str(split.classes[label]) for split in splits.values()]
        classes.add_row(escape(label), *counts)
    classes.add_section()
    classes.add_row("all", *[str(split.rows) for split in splits.values()])
    console.print(classes)

    lengths = Table("split", title="Lengths (p50 / p95 / max) and duplicate rows")
    for column in ("words", "tokens", "verbatim", "folded"):
        lengths.add_column(column, justify="right")
    for name, split in splits.items():
        same = split.duplicate_rows
        lengths.add_row(
            name, _show(split.words), _show(split.tokens), str(same.verbatim), str(same.folded)
        )
    console.print(lengths)
    for labels in statistics.conflicting_labels:
        console.print(f"one text, several labels: {', '.join(labels)}", markup=False)
    for warning in statistics.warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}")


def _show(lengths: Lengths | None) -> str:
    return "-" if lengths is None else f"{lengths.p50} / {lengths.p95} / {lengths.max}"

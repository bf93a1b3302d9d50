"""Train, valid and test: what the user gives is kept as it is, and what is missing is split off.

Reads ``sample``, a file or a folder into three tuples of examples. A split made
here is stratified by class, depends on the seed alone, and never has two spellings of one text
on both sides.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from itertools import chain
from pathlib import Path
from typing import Literal

from trainkit.data.columns import Columns
from trainkit.data.readers import Example, first_few, read_file
from trainkit.serve.errors import InputError

SAMPLE = files("trainkit.data") / "sample" / "questions.label"
STEMS = {
    "train": "train",
    "train_5500": "train",  # the official TREC names
    "trec_10": "test",
    "valid": "valid",
    "val": "valid",
    "dev": "valid",
    "validation": "valid",
    "test": "test",
}


@dataclass(frozen=True)
class Splits:
    """The examples of a run: to fit, to choose the epoch by, and to report on."""

    train: tuple[Example, ...]
    valid: tuple[Example, ...]
    test: tuple[Example, ...]

    @property
    def label_names(self) -> tuple[str, ...]:
        """The classes of train, sorted: a label's place here is its class id."""
        return tuple(sorted({example.label for example in self.train}))


def fold(text: str) -> str:
    """Return the text without differences of case and whitespace: what counts as the same text."""
    return " ".join(text.casefold().split())


def load(source: str | Path, columns: Columns, seed: int = 0, test: Path | None = None) -> Splits:
    """Return the three splits of a source.

    ``source`` is the string ``"sample"`` (the packaged questions; a path of that name is
    ``./sample``), a file, or a folder whose files are called train, valid (or val, dev,
    validation) and test, or as the official TREC files are. ``test`` is a file that stays the
    test set whole. Each split that is not given is a tenth of train, taken out of it.

    Given files stay exactly as they are: a test text that also stands in train is not removed
    from train (published figures keep it); ``trainkit.data.statistics`` reports it.

    Raises ``InputError`` if a file is faulty, train is missing, two files claim one split, a class
    is too small to be split, train has fewer than two classes, or valid or test has another class.
    """
    if source == "sample":
        with as_file(SAMPLE) as path:
            return load(path, columns, seed, test)
    paths = _paths(Path(source))
    if test is not None:
        if "test" in paths:
            raise InputError(
                f"{paths['test']} and {test} are both the test set; leave one of them out."
            )
        paths["test"] = test
    return complete({split: read_file(path, columns) for split, path in paths.items()}, paths, seed)


def complete(
    rows: dict[str, list[Example]], origins: Mapping[str, Path | str], seed: int = 0
) -> Splits:
    """Return the splits in ``rows``, train and perhaps others; take a missing one out of train.

    ``origins`` names where each given split came from. Raises ``InputError`` as :func:`load` does.
    """
    _check_two_classes(rows["train"], origins["train"])
    missing = [split for split in ("valid", "test") if split not in rows]
    if missing:
        rows = rows | split_off(rows["train"], missing, seed, origins["train"])
    _check_known_classes(rows, origins)
    return Splits(tuple(rows["train"]), tuple(rows["valid"]), tuple(rows["test"]))


def load_split(
    source: str | Path,
    columns: Columns,
    split: Literal["train", "valid", "test", "all"] | None = None,
    seed: int = 0,
) -> tuple[Example, ...]:
    """Return what is to be scored: one split, or all of them.

    By default the test set, and of a single file all. Splits that are made, not given, are those of
    a training with ``seed``.
    """
    if source != "sample" and not Path(source).is_dir() and split in (None, "all"):
        return tuple(read_file(Path(source), columns))
    splits = load(source, columns, seed)
    if split == "all":
        return splits.train + splits.valid + splits.test
    chosen: tuple[Example, ...] = getattr(splits, split or "test")
    return chosen


def load_sample() -> list[Example]:
    """Return the project's own questions, in the order of their file."""
    with as_file(SAMPLE) as path:
        return read_file(path, Columns())


def split_off(
    examples: Sequence[Example], names: Sequence[str], seed: int, where: Path | str
) -> dict[str, list[Example]]:
    """Deal the examples to ``train`` and to each of ``names``, which get a tenth of every class.

    Texts that are the same when folded form a group, which goes as one to the class most of its
    rows have; tenths are counted in groups, at least one. Rows keep their order. ``where`` is for
    the ``InputError`` that a class with fewer groups than splits raises.
    """
    groups = _groups_by_class(examples)
    _check_sizes(groups, Counter(example.label for example in examples), len(names) + 1, where)
    rng = random.Random(seed)
    parts: dict[str, list[int]] = {name: [] for name in ("train", *names)}
    for of_class in groups.values():
        rng.shuffle(of_class)
        share = max(1, round(len(of_class) / 10))
        for i, name in enumerate(names):
            parts[name] += chain.from_iterable(of_class[i * share : (i + 1) * share])
        parts["train"] += chain.from_iterable(of_class[len(names) * share :])
    return {name: [examples[i] for i in sorted(indices)] for name, indices in parts.items()}


def _groups_by_class(examples: Sequence[Example]) -> dict[str, list[list[int]]]:
    """Return each class, sorted by name, with its groups of row indices."""
    same_text: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        same_text[fold(example.text)].append(index)
    # Classes that lose every one of their texts to another class are kept, to be reported.
    groups: dict[str, list[list[int]]] = {
        label: [] for label in sorted({example.label for example in examples})
    }
    for indices in same_text.values():
        counts = Counter(examples[index].label for index in indices)
        majority = min(counts, key=lambda label: (-counts[label], label))
        groups[majority].append(indices)
    return groups


def _paths(source: Path) -> dict[str, Path]:
    """Return the file of each split that the source gives."""
    if not source.is_dir():
        return {"train": source}
    try:
        entries = sorted(source.iterdir())
    except OSError as error:
        raise InputError(
            f"{source} cannot be read ({error.strerror}); expected a folder you may list."
        ) from None
    paths: dict[str, Path] = {}
    # Any suffix: a test.parquet that is passed over would silently become a tenth of train.
    for path in entries:
        split = STEMS.get(path.stem.casefold())
        if split is None or not path.is_file():
            continue
        if split in paths:
            raise InputError(
                f"{source} has two files for {split}, {paths[split].name} and {path.name}; "
                "keep one of them there."
            )
        paths[split] = path
    if "train" not in paths:
        raise InputError(
            f"{source} has no train file; expected train.csv (or .tsv, .jsonl, .label) or "
            "train_5500.label in it."
        )
    return paths


def _check_two_classes(train: Sequence[Example], where: Path | str) -> None:
    labels = {example.label for example in train}
    if len(labels) < 2:
        raise InputError(
            f"{where} has one class only, {train[0].label!r}; expected two or more: "
            "add examples of another class or choose another label column."
        )


def _check_sizes(
    groups: Mapping[str, list[list[int]]], rows: Mapping[str, int], needed: int, where: Path | str
) -> None:
    small = [
        f"{label!r} ({rows[label]} rows, {len(of_class)} distinct texts)"
        for label, of_class in groups.items()
        if len(of_class) < needed
    ]
    if small:
        raise InputError(
            f"{where}: {len(small)} class{'es' * (len(small) > 1)} with too few examples to be in "
            f"each of {needed} splits, which takes {needed} distinct texts: {first_few(small)}; "
            "add examples, merge or drop the class, or give valid and test files."
        )


def _check_known_classes(
    rows: Mapping[str, list[Example]], origins: Mapping[str, Path | str]
) -> None:
    known = {example.label for example in rows["train"]}
    unknown = [
        f"{label!r} ({count} in {origins.get(split, split)})"
        for split in ("valid", "test")
        for label, count in sorted(Counter(example.label for example in rows[split]).items())
        if label not in known
    ]
    if unknown:
        raise InputError(
            f"{origins['train']} has no examples of {len(unknown)} class"
            f"{'es' * (len(unknown) > 1)} that other splits have: {first_few(unknown)}; "
            "add such examples to train or remove those rows."
        )

import dataclasses
import io
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from trainkit.data.readers import Columns, Example
from trainkit.data.splits import Splits, load
from trainkit.data.statistics import Lengths, SameTexts, Statistics, describe, print_statistics


def examples(label: str, *texts: str) -> tuple[Example, ...]:
    return tuple(Example(text, label) for text in texts)


TRAIN = (
    examples("LOC", "Where is Oslo ?", "Where is Oslo ?", "where is  OSLO ?", "Where is Lima ?")
    + examples("NUM", "How far is Mars ?", "How far is the moon ?", "How old is Rome ?")
    + examples("HUM", "How far is the Moon ?")
)
VALID = examples("LOC", "WHERE is Oslo ?") + examples("NUM", "How far is Mars ?")
TEST = examples("NUM", "Where is Lima ?", "How deep is the sea ?")
SMALL = Splits(TRAIN, VALID, TEST)


def printed(statistics: Statistics) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_statistics(statistics, console)
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(output, str)
    return output


def test_rows_are_counted_by_class_and_split() -> None:
    splits = describe(SMALL).splits
    assert {name: split.rows for name, split in splits.items()} == {
        "train": 8,
        "valid": 2,
        "test": 2,
    }
    assert splits["train"].classes == {"HUM": 1, "LOC": 4, "NUM": 3}
    assert splits["test"].classes == {"HUM": 0, "LOC": 0, "NUM": 2}


def test_duplicates_and_overlap_are_counted_verbatim_and_folded() -> None:
    statistics = describe(SMALL)
    # Folded, the Oslo questions are one text and so are the two about the moon.
    assert statistics.splits["train"].duplicate_rows == SameTexts(verbatim=1, folded=3)
    assert statistics.overlap == {
        "train/valid": SameTexts(verbatim=1, folded=2),
        "train/test": SameTexts(verbatim=1, folded=1),
        "valid/test": SameTexts(verbatim=0, folded=0),
    }


def test_conflicting_labels_are_counted_and_shown_without_their_texts() -> None:
    statistics = describe(SMALL)
    assert statistics.conflicting_texts == 2
    assert statistics.conflicting_labels == [["LOC", "NUM"], ["HUM", "NUM"]]
    many = tuple(Example(f"Question {i // 2}", "AB"[i % 2]) for i in range(20))
    assert describe(Splits(many, (), ())).conflicting_texts == 10
    assert len(describe(Splits(many, (), ())).conflicting_labels) == 5


def test_each_trap_gives_a_warning() -> None:
    few, *same, conflict = describe(SMALL).warnings
    assert few == "Under 10 training examples: 'HUM' (1), 'LOC' (4), 'NUM' (3)."
    assert same == [
        "Distinct texts in both train and valid: 2 (1 verbatim, the others differ in case or "
        "whitespace).",
        "Distinct texts in both train and test: 1 (1 verbatim, the others differ in case or "
        "whitespace).",
    ]
    assert conflict == "Texts with more than one label: 2."


def test_a_class_over_20_times_rarer_than_the_largest_gives_a_warning() -> None:
    def warnings(largest: int) -> list[str]:
        large = examples("A", *(f"a {i}" for i in range(largest)))
        rare = examples("B", *(f"b {i}" for i in range(10)))
        return describe(Splits(large + rare, (), ())).warnings

    assert warnings(200) == []
    assert warnings(201) == ["Over 20 times rarer than the largest class (201): 'B' (10)."]


def test_clean_data_gives_no_warning() -> None:
    assert describe(load("sample", Columns())).warnings == []


@pytest.mark.parametrize("labels", ["coarse", "fine"])
def test_the_samples_numbers_agree_with_an_independent_count(labels: str) -> None:
    splits = load("sample", Columns(labels=labels))  # type: ignore[arg-type]
    statistics = describe(splits, count_tokens=lambda texts: [len(text) for text in texts])
    for name in ("train", "valid", "test"):
        rows = getattr(splits, name)
        split = statistics.splits[name]
        assert split.classes == Counter(row.label for row in rows)
        assert sum(split.classes.values()) == split.rows == len(rows)
        assert split.words == percentiles([len(row.text.split()) for row in rows])
        assert split.tokens == percentiles([len(row.text) for row in rows])


def percentiles(lengths: list[int]) -> Lengths:
    p50, p95 = np.percentile(lengths, [50, 95], method="inverted_cdf")
    return Lengths(p50, p95, max(lengths))


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=80))
def test_percentiles_are_nearest_rank(lengths: list[int]) -> None:
    rows = tuple(Example(" ".join(["word"] * n), "A") for n in lengths)
    words = describe(Splits(rows, (), ())).splits["train"].words
    # By definition: the shortest length that covers that share of the texts.
    for percent, value in ((50, words.p50), (95, words.p95), (100, words.max)):
        covered = [
            n for n in lengths if sum(m <= n for m in lengths) * 100 >= percent * len(lengths)
        ]
        assert value == min(covered)


def test_an_empty_split_is_described_too() -> None:
    assert describe(Splits(TRAIN, (), ())).splits["test"].words == Lengths(0, 0, 0)


def test_statistics_are_json() -> None:
    as_dict = dataclasses.asdict(describe(SMALL))
    assert json.loads(json.dumps(as_dict)) == as_dict
    assert as_dict["splits"]["train"]["tokens"] is None


def test_all_is_printed_and_labels_are_not_taken_for_markup() -> None:
    train = TRAIN + examples("[red]", "Where is  lima ?")
    output = printed(describe(Splits(train, VALID, TEST), lambda texts: [7 for _ in texts]))
    assert "[red]" in output
    assert "LOC, NUM, [red]" in output
    assert "7 / 7 / 7" in output
    assert "warning: Under 10 training examples: 'HUM' (1), 'LOC' (4), 'NUM' (3), '[red]'" in output


def test_no_token_lengths_are_printed_where_none_were_counted() -> None:
    assert "│      - │" in printed(describe(SMALL))

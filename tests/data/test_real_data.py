"""The data sets of the project's README, where they are on this machine: none is committed."""

import hashlib
import os
from collections import Counter
from pathlib import Path

import pytest

from trainkit.data import trec
from trainkit.data.readers import Columns, Example, read_file
from trainkit.data.splits import Splits, fold, load
from trainkit.data.statistics import Lengths, SameTexts, describe

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
DATA = Path(os.environ.get("TRAINKIT_DATA", SHARED))

pytestmark = pytest.mark.skipif(
    not (DATA / "trec").is_dir(), reason=f"{DATA} has no trec folder; set TRAINKIT_DATA to one"
)


def whole(name: str, columns: Columns | None = None) -> Splits:
    """Train and test files as they are, with nothing split off."""
    columns = columns or Columns()
    stem = {"trec": ("train_5500.label", "TREC_10.label"), "newsgroups20": ("train.jsonl",) * 2}
    train, test = stem.get(name, ("train.csv", "test.csv"))
    rows = [tuple(read_file(DATA / name / file, columns)) for file in (train, test)]
    return Splits(rows[0], (), rows[1])


def test_trec_has_the_official_counts() -> None:
    splits = whole("trec")
    assert (len(splits.train), len(splits.test)) == (5452, 500)
    assert splits.label_names == ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
    assert describe(splits).splits["train"].classes["ABBR"] == 86
    fine = whole("trec", Columns(labels="fine"))
    assert len(fine.label_names) == 50
    assert len({example.label for example in fine.test}) == 42


def test_trec_has_71_duplicate_rows_and_10_leaked_questions_verbatim() -> None:
    statistics = describe(whole("trec"))
    assert statistics.splits["train"].duplicate_rows == SameTexts(verbatim=71, folded=72)
    assert statistics.overlap["train/test"] == SameTexts(verbatim=10, folded=11)


def test_trecs_duplicates_agree_with_a_count_on_the_bytes() -> None:
    lines = (DATA / "trec" / "train_5500.label").read_bytes().split(b"\n")
    questions = Counter(line.split(b" ", 1)[1].strip() for line in lines if line)
    assert sum(questions.values()) - len(questions) == 71


def test_trecs_lengths_are_those_of_the_readme() -> None:
    assert describe(whole("trec")).splits["train"].words == Lengths(10, 17, 37)


def test_trecs_one_latin_1_byte_is_read() -> None:
    odd = [i for i, row in enumerate(whole("trec").train) if not row.text.isascii()]
    assert odd == [65]
    assert "sister\xf0city" in whole("trec").train[65].text


@pytest.mark.parametrize("labels", ["coarse", "fine"])
def test_a_folder_with_trec_keeps_its_test_set_and_its_leaked_questions(labels: str) -> None:
    columns = Columns(labels=labels)  # type: ignore[arg-type]
    given, splits = whole("trec", columns), load(DATA / "trec", columns, seed=1)
    assert splits.test == given.test
    assert Counter(splits.train + splits.valid) == Counter(given.train)
    assert abs(len(splits.valid) - 545) < 25
    assert not {fold(e.text) for e in splits.train} & {fold(e.text) for e in splits.valid}
    overlap = describe(splits).overlap
    assert overlap["train/test"].verbatim + overlap["valid/test"].verbatim == 10
    assert any("train and test" in warning for warning in describe(splits).warnings)


def test_fetch_takes_the_official_files(tmp_path: Path) -> None:
    paths = trec.fetch(tmp_path, DATA / "trec")
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert digests == list(trec.SHA256.values())


def test_banking77_is_read_as_it_is() -> None:
    splits = whole("banking77")
    assert (len(splits.train), len(splits.test), len(splits.label_names)) == (10003, 3080, 77)
    assert describe(splits).splits["train"].words == Lengths(10, 29, 79)
    first = Example("I am still waiting on my card?", "card_arrival")
    assert splits.train[0] == first


def test_newsgroups_is_read_and_split() -> None:
    splits = load(DATA / "newsgroups20", Columns())
    assert (len(splits.train) + len(splits.valid), len(splits.test)) == (900, 450)
    lengths = describe(Splits(splits.train + splits.valid, (), splits.test)).splits["train"].words
    # The README's 714 lies between two texts' lengths; nearest rank gives one of them.
    assert lengths == Lengths(142, 713, 8411)

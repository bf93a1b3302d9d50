import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.data.readers import Columns, Example, read_file
from trainkit.data.splits import Splits, fold, load, load_sample, load_split, split_off
from trainkit.serve.errors import InputError

WHERE = Path("train.csv")

QUESTIONS = {
    "LOC": "Where is {} ?",
    "NUM": "How many people live in {} ?",
    "HUM": "Who founded {} ?",
}
CITIES = [
    *("Oslo", "Lima", "Rome", "Cairo", "Delhi", "Quito", "Perth", "Tunis", "Dakar", "Turin"),
    *("Malmo", "Kyoto", "Accra", "Basel", "Lyon", "Porto", "Split", "Sofia", "Riga", "Minsk"),
]


def questions(cities: list[str] = CITIES) -> list[Example]:
    return [Example(QUESTIONS[label].format(city), label) for city in cities for label in QUESTIONS]


def write_csv(path: Path, examples: list[Example]) -> Path:
    path.write_text("text,label\n" + "".join(f'"{e.text}",{e.label}\n' for e in examples))
    return path


def fault(source: str | Path, test: Path | None = None) -> str:
    with pytest.raises(InputError) as caught:
        load(source, Columns(), test=test)
    return str(caught.value)


def sizes(splits: Splits) -> tuple[int, int, int]:
    return len(splits.train), len(splits.valid), len(splits.test)


# Few texts in several spellings, so that groups and conflicting labels are common; and three
# texts of its own for each class, so that every draw can be split.
LABELS = ("A", "B", "ß")
OWN = [Example(f"{label} {i}", label) for label in LABELS for i in range(3)]
SPELLINGS = st.sampled_from([str.upper, str.lower, lambda text: text.replace(" ", "  ")])
ROWS = st.lists(
    st.builds(
        lambda number, label, spell: Example(spell(f"Question {number}"), label),
        st.integers(0, 60),
        st.sampled_from(LABELS),
        SPELLINGS,
    ),
    max_size=150,
).flatmap(lambda rows: st.permutations([*OWN, *rows]))
NAMES = st.sampled_from([("valid",), ("test",), ("valid", "test")])
SEEDS = st.integers(0, 2**32)


@settings(deadline=None)
@given(ROWS, NAMES, SEEDS)
def test_a_split_loses_nothing_and_separates_no_text(
    rows: list[Example], names: tuple[str, ...], seed: int
) -> None:
    parts = split_off(rows, names, seed, WHERE)
    assert Counter(e for part in parts.values() for e in part) == Counter(rows)
    texts = [{fold(e.text) for e in part} for part in parts.values()]
    assert sum(map(len, texts)) == len(set.union(*texts))


@settings(deadline=None)
@given(ROWS, NAMES, SEEDS)
def test_a_split_depends_on_its_seed_alone(
    rows: list[Example], names: tuple[str, ...], seed: int
) -> None:
    assert split_off(rows, names, seed, WHERE) == split_off(rows, names, seed, WHERE)


@settings(deadline=None)
@given(ROWS, NAMES, SEEDS)
def test_every_class_is_in_every_split(
    rows: list[Example], names: tuple[str, ...], seed: int
) -> None:
    labels = {e.label for e in rows}
    for part in split_off(rows, names, seed, WHERE).values():
        assert {e.label for e in part} == labels


@settings(deadline=None)
@given(
    counts=st.dictionaries(st.sampled_from("ABCDE"), st.integers(3, 90), min_size=2),
    names=NAMES,
    seed=SEEDS,
)
def test_a_split_takes_a_tenth_of_every_class(
    counts: dict[str, int], names: tuple[str, ...], seed: int
) -> None:
    rows = [Example(f"{label} {i}", label) for label, n in counts.items() for i in range(n)]
    parts = split_off(rows, names, seed, WHERE)
    for name in names:
        for label, count in Counter(e.label for e in parts[name]).items():
            assert abs(count - counts[label] / 10) < 1


def test_rows_keep_their_order() -> None:
    rows = questions()
    for part in split_off(rows, ("valid", "test"), 0, WHERE).values():
        assert part == [e for e in rows if e in part]


def test_another_seed_splits_otherwise() -> None:
    one, other = (split_off(questions(), ("test",), seed, WHERE) for seed in (0, 1))
    assert one != other


def test_a_split_does_not_depend_on_hash_randomisation() -> None:
    program = (
        "from trainkit.data.readers import Columns; from trainkit.data.splits import load;"
        "print([e.text for e in load('sample', Columns('fine'), seed=3).test])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_a_text_that_several_classes_claim_stays_together() -> None:
    claims = [Example("where is OSLO ?", "LOC"), Example("Where is Oslo ?", "NUM")]
    parts = split_off([*questions(), *claims], ("valid", "test"), 0, WHERE)
    holding = [part for part in parts.values() if "where is oslo ?" in {fold(e.text) for e in part}]
    assert len(holding) == 1
    assert set(claims) <= set(holding[0])


def test_a_file_is_split_80_10_10(tmp_path: Path) -> None:
    splits = load(write_csv(tmp_path / "a.csv", questions()), Columns())
    assert sizes(splits) == (48, 6, 6)
    assert splits.label_names == ("HUM", "LOC", "NUM")


def test_a_given_test_file_stays_whole_and_its_texts_stay_in_train(tmp_path: Path) -> None:
    rows = questions()
    test = write_csv(tmp_path / "b.csv", rows[:5] + rows[:2])
    splits = load(write_csv(tmp_path / "a.csv", rows), Columns(), test=test)
    assert sizes(splits) == (54, 6, 7)
    assert list(splits.test) == rows[:5] + rows[:2]
    assert Counter(splits.train + splits.valid) == Counter(rows)


@pytest.mark.parametrize("valid", ["valid", "val", "dev", "validation", "VALID"])
def test_a_folder_is_taken_as_it_is(tmp_path: Path, valid: str) -> None:
    rows = questions()
    write_csv(tmp_path / "train.csv", rows[:40])
    write_csv(tmp_path / f"{valid}.csv", rows[40:50])
    (tmp_path / "test.jsonl").write_text('{"question": "Who ?", "intent": "HUM"}\n')
    (tmp_path / "README.md").write_text("The questions.")
    splits = load(tmp_path, Columns())
    assert splits.train == tuple(rows[:40])
    assert splits.valid == tuple(rows[40:50])
    assert splits.test == (Example("Who ?", "HUM"),)


def test_what_a_folder_lacks_is_split_off_from_train(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", questions())
    assert sizes(load(tmp_path, Columns())) == (48, 6, 6)
    test = write_csv(tmp_path / "test.csv", questions()[:9])
    assert sizes(load(tmp_path, Columns())) == (54, 6, 9)
    test.rename(tmp_path / "dev.csv")
    assert sizes(load(tmp_path, Columns())) == (54, 9, 6)


def test_a_folder_with_the_official_trec_names(tmp_path: Path) -> None:
    lines = [f"{e.label}:x {e.text}\n" for e in questions()]
    (tmp_path / "train_5500.label").write_text("".join(lines))
    (tmp_path / "TREC_10.label").write_text("".join(lines[:6]))
    assert sizes(load(tmp_path, Columns())) == (54, 6, 6)


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "train.csv", questions())
    write_csv(tmp_path / "dev.csv", questions())
    write_csv(tmp_path / "val.csv", questions())
    assert "two files for valid, dev.csv and val.csv" in fault(tmp_path)
    (tmp_path / "val.csv").rename(tmp_path / "test.csv")
    assert "are both the test set" in fault(tmp_path, test=train)


def test_a_split_in_an_unknown_format_is_refused_not_passed_over(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", questions())
    (tmp_path / "test.parquet").write_text("PAR1")
    assert "'.parquet'" in fault(tmp_path)


def test_a_folder_without_train_and_a_missing_path_are_refused(tmp_path: Path) -> None:
    write_csv(tmp_path / "test.csv", questions())
    assert "no train file" in fault(tmp_path)
    assert "does not exist" in fault(tmp_path / "nowhere")


def test_a_class_too_small_to_split_is_named_with_its_count(tmp_path: Path) -> None:
    pair = [Example("How do I open the app ?", "DESC"), Example("Why ?", "DESC")]
    path = write_csv(tmp_path / "a.csv", questions() + pair)
    message = fault(path)
    assert "1 class with too few" in message
    assert "'DESC' (2 rows, 2 distinct texts)" in message
    assert "merge or drop the class" in message
    # Two rows are enough where only one split is made.
    test = write_csv(tmp_path / "test.csv", questions())
    assert {"DESC"} <= {e.label for e in load(path, Columns(), test=test).valid}
    write_csv(path, questions() + pair[:1])
    assert "'DESC' (1 rows" in fault(path, test=test)


def test_rows_that_repeat_one_text_do_not_make_a_class_large_enough(tmp_path: Path) -> None:
    rows = questions() + [Example("Why ?", "DESC"), Example("why ?", "DESC")] * 5
    assert "(10 rows, 1 distinct texts)" in fault(write_csv(tmp_path / "a.csv", rows))


def test_a_class_that_has_no_text_of_its_own_is_refused(tmp_path: Path) -> None:
    rows = questions() + [Example(e.text, e.label) for e in questions()]
    rows += [Example(QUESTIONS["LOC"].format(city), "PLACE") for city in CITIES]
    assert "'PLACE' (20 rows, 0 distinct texts)" in fault(write_csv(tmp_path / "a.csv", rows))


def test_one_class_is_refused(tmp_path: Path) -> None:
    rows = [e for e in questions() if e.label == "LOC"]
    assert "one class only, 'LOC'" in fault(write_csv(tmp_path / "a.csv", rows))


def test_a_label_that_train_lacks_is_refused_with_its_place(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "train.csv", questions())
    unknown = [Example("Why ?", "DESC"), Example("Why not ?", "DESC")]
    test = write_csv(tmp_path / "other.csv", questions() + unknown)
    message = fault(train, test=test)
    assert f"'DESC' (2 in {test})" in message
    assert str(train) in message


def test_a_fault_in_a_file_names_that_file(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", questions())
    (tmp_path / "test.csv").write_text("text,label\n,LOC\n")
    assert f"{tmp_path / 'test.csv'} has 1 faulty line" in fault(tmp_path)


def test_the_sample_is_split_and_a_path_of_that_name_is_not_the_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = load("sample", Columns())
    assert splits.label_names == ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
    monkeypatch.chdir(tmp_path)
    Path("sample").mkdir()
    write_csv(Path("sample/train.csv"), questions())
    assert load("sample", Columns()) == splits
    assert len(load("./sample", Columns()).label_names) == 3


def test_the_sample_can_be_split_by_its_fine_labels() -> None:
    assert len(load("sample", Columns(labels="fine")).label_names) == 50


def test_a_test_file_goes_with_the_sample_too(tmp_path: Path) -> None:
    test = write_csv(tmp_path / "mine.csv", questions())
    splits = load("sample", Columns(), test=test)
    assert list(splits.test) == read_file(test, Columns())


def test_the_sample_can_be_asked_for_by_split():
    assert load_split("sample", Columns(), "test") == load("sample", Columns()).test
    assert len(load_split("sample", Columns(), "all")) == len(load_sample())


def test_a_file_is_scored_whole_where_nobody_asks_for_a_split(tmp_path):
    (tmp_path / "few.csv").write_text("text,label\nWho are you?,HUM\n")
    for split in (None, "all"):
        found = load_split(tmp_path / "few.csv", Columns(), split)
        assert found == (Example("Who are you?", "HUM"),)


@pytest.mark.parametrize("source", ["sample", "file"])
def test_a_split_that_is_made_is_that_of_a_trainings_seed(source, tmp_path):
    if source == "file":
        source = write_csv(tmp_path / "mine.csv", questions())
    made = [load_split(source, Columns(), "test", seed) for seed in (0, 1)]
    assert made == [load(source, Columns(), seed).test for seed in (0, 1)]
    assert made[0] != made[1]

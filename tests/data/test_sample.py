from collections import Counter
from importlib.resources import files

from trainkit.data.readers import Columns, Example, read_file
from trainkit.data.splits import fold, load


def sample(columns: Columns) -> list[Example]:
    splits = load("sample", columns)
    return [*splits.train, *splits.valid, *splits.test]


def test_the_sample_has_six_classes_of_a_hundred_questions_or_more() -> None:
    classes = Counter(example.label for example in sample(Columns()))
    assert sorted(classes) == ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"]
    assert min(classes.values()) >= 100
    assert classes.total() >= 600


def test_no_question_stands_in_the_sample_twice() -> None:
    texts = [fold(example.text) for example in sample(Columns())]
    assert len(set(texts)) == len(texts)


def test_the_samples_questions_are_not_one_template_filled_in() -> None:
    openings = Counter(tuple(fold(e.text).split()[:4]) for e in sample(Columns()))
    assert max(openings.values()) <= 8


def test_the_sample_is_utf_8_with_one_question_a_line() -> None:
    content = (files("trainkit.data") / "sample" / "questions.label").read_text(encoding="utf-8")
    assert len(content.splitlines()) == len(sample(Columns()))
    assert all(example.text.endswith(("?", ".", "!")) for example in sample(Columns()))


def test_the_samples_fine_classes_each_belong_to_one_coarse_class() -> None:
    coarse = Counter(example.label for example in sample(Columns()))
    fine = Counter(example.label for example in sample(Columns(labels="fine")))
    for label, count in coarse.items():
        assert sum(n for name, n in fine.items() if name.split(":")[0] == label) == count


def test_reading_the_sample_by_path_gives_the_same_rows() -> None:
    path = files("trainkit.data") / "sample" / "questions.label"
    assert Counter(read_file(path, Columns())) == Counter(sample(Columns()))  # type: ignore[arg-type]

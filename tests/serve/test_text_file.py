"""The texts of a file in chunks: together they are the file, whatever the size of a chunk."""

import csv
import json
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainkit.data.splits import load_sample
from trainkit.serve import Classifier
from trainkit.serve.errors import InputError
from trainkit.serve.file_answers import answers, thread_answers, write
from trainkit.serve.text_file import TextFile, TextRow

GOLDEN = Path(__file__).parents[1] / "golden" / "bundle"
TEXTS = [example.text for example in load_sample()[:40]]
ODD = [
    'He said "no".',
    "two\nlines",
    "a, b",
    "Straße in 東京",
    "U+2028 \u2028 inside",
    "x" * 200_000,
]


def text_file(folder, texts):
    path = folder / "texts.txt"
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8-sig")
    return TextFile(path)


def csv_file(folder, texts):
    path = folder / "texts.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["number", "text"])
        writer.writerows(enumerate(texts))
    return TextFile(path)


def json_file(folder, texts):
    path = folder / "texts.jsonl"
    lines = (json.dumps({"text": text}, ensure_ascii=number % 2 == 0) for number, text in texts)
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return TextFile(path)


def numbered(folder, texts):
    return json_file(folder, list(enumerate(texts)))


def read(file, rows):
    return [row for chunk in file.chunks(rows) for row in file.read(chunk)]


@pytest.mark.parametrize("rows", [1, 3, 7, 1000])
@pytest.mark.parametrize("make", [text_file, csv_file, numbered])
def test_the_chunks_are_the_file(make, rows, tmp_path):
    texts = TEXTS if make is text_file else [*TEXTS, *ODD]
    file = make(tmp_path, texts)
    found = read(file, rows)
    assert [row.text for row in found] == texts
    assert found == read(file, 10**6)  # the same lines, too
    content = file.path.read_text(encoding="utf-8-sig").split("\n")
    assert all(texts[0] in content[found[0].line - 1] for _ in [0])
    assert TEXTS[9] in content[found[9].line - 1].replace('""', '"')


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(alphabet='ab",\n é', min_size=1).filter(str.strip), min_size=1),
    rows=st.integers(1, 5),
)
def test_any_quoting_is_cut_between_rows(texts, rows, tmp_path):
    found = read(csv_file(tmp_path, texts), rows)
    assert [row.text for row in found] == [text.strip() for text in texts]


def test_chunks_lie_one_after_the_other(tmp_path):
    file = csv_file(tmp_path, TEXTS)
    chunks = file.chunks(7)
    assert [len(file.read(chunk)) for chunk in chunks] == [7] * 5 + [5]
    ends = [chunk.start + chunk.size_bytes for chunk in chunks]
    assert [0, *ends[:-1]] == [chunk.start for chunk in chunks]
    assert ends[-1] == file.path.stat().st_size
    assert file.read(chunks[1])[0] == TextRow(9, TEXTS[7])  # the header is line 1


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b"Who ?\n\nWhere ?\n", "line 2: empty text"),
        ("a.txt", b"Who ?\nCaf\xe9\n", "line 2: not UTF-8"),
        ("a.txt", b"", "has no texts"),
        ("a.label", b"NUM:dist How far ?\n", "no known format"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b"question\nWho ?\n", "no column 'text'; it has: question"),
        ("a.csv", b"text,n\nWho ?,1\nWhere ?\n", "line 3: 1 fields, but the header has 2"),
        ("a.csv", b'text\nWho ?\n"Where ?\nWhen ?\n', "line 3: not CSV"),
        ("a.csv", b"text\n' '\n\" \"\n", "line 3: empty text"),
        ("a.csv", b"text\nWho ?\nCaf\xe9\n", "line 3: not UTF-8"),
        ("a.jsonl", b'{"text": "Who ?"}\n\n{"text": 3}\n', "line 3: no string under 'text'"),
        ("a.jsonl", b'{"text": "Who ?"}\n[]\n', "line 2: no string under 'text'"),
        ("a.jsonl", b"Who ?\n", "line 1: not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: not JSON"),
        ("a.txt", b"\n" * 9, "and 4 more"),
    ],
)
def test_a_faulty_file_is_refused_whole_with_its_lines(name, content, told, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match="^.*" + told.replace("?", r"\?")):
        TextFile(path).chunks()


def test_a_file_that_is_not_there_or_changes_is_said(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        TextFile(tmp_path / "none.csv")
    file = csv_file(tmp_path, TEXTS)
    chunk = file.chunks(7)[1]
    file.path.write_text("text\n")
    with pytest.raises(InputError, match="was changed"):
        file.read(chunk)


def test_answers_are_the_classifiers_with_the_lines_number(tmp_path):
    classify = Classifier.load(GOLDEN, threads=1)
    file = csv_file(tmp_path, TEXTS)
    output = tmp_path / "answers.jsonl"
    assert write(output, (answers(classify, file, chunk) for chunk in file.chunks(7))) == 40
    found = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert [one["line"] for one in found] == list(range(2, 42))
    for one, expected in zip(found, classify(TEXTS), strict=True):
        assert one["label"] == expected.label
        assert one["scores"] == pytest.approx(expected.scores, abs=1e-5)


@pytest.mark.parametrize("workers", [1, 3, None])
def test_the_number_of_threads_changes_no_byte(workers, tmp_path):
    classify = Classifier.load(GOLDEN, threads=1)
    file = csv_file(tmp_path, TEXTS)
    chunks = file.chunks(3)
    expected = [answers(classify, file, chunk) for chunk in chunks]
    assert list(thread_answers(GOLDEN, file, chunks, workers)) == expected


def test_a_file_that_changes_meanwhile_ends_the_threads(tmp_path):
    file = csv_file(tmp_path, TEXTS)
    chunks = file.chunks(3)
    file.path.write_text("text\n")
    with pytest.raises(InputError, match="was changed"):
        list(thread_answers(GOLDEN, file, chunks, 2))
    assert not [one for one in threading.enumerate() if one.name.startswith("trainkit-answers")]


def test_an_output_is_whole_or_as_it_was(tmp_path, tree):
    output = tmp_path / "answers.jsonl"
    output.write_bytes(b"old\n")
    before = tree(tmp_path)

    def parts():
        yield b"new\n"
        raise InputError("it stopped")

    with pytest.raises(InputError, match="it stopped"):
        write(output, parts())
    assert tree(tmp_path) == before
    with pytest.raises(InputError, match="cannot be written"):
        write(tmp_path / "none" / "answers.jsonl", [b"new\n"])


def test_an_output_that_is_a_folder_is_refused_before_the_work(tmp_path):
    def parts():
        raise AssertionError("it was computed")
        yield

    with pytest.raises(InputError, match="is a directory; name a file in it"):
        write(tmp_path, parts())
    assert list(tmp_path.iterdir()) == []

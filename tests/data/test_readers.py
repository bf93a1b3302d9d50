import codecs
import csv
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.data.readers import Columns, Example, first_few, read_file
from trainkit.serve.errors import InputError

MARS = Example("How far is it from Denver to Aspen ?", "NUM")
CARD = Example('My card says "expired",\nwhat now?', "card_expired")
ARRIVAL = Example("I am still waiting on my card?", "card_arrival")


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def fault(path: Path, columns: Columns | None = None) -> str:
    with pytest.raises(InputError) as caught:
        read_file(path, columns or Columns())
    return str(caught.value)


def test_trec_lines_give_coarse_or_fine_labels(tmp_path: Path) -> None:
    path = write(tmp_path, "a.label", "NUM:dist How far is it from Denver to Aspen ?\r\n\n")
    assert read_file(path, Columns()) == [MARS]
    assert read_file(path, Columns(labels="fine")) == [Example(MARS.text, "NUM:dist")]


def test_trec_files_may_be_latin_1_as_the_official_one_is(tmp_path: Path) -> None:
    # Byte 0x85 is a line end to str.splitlines, and must not be one here.
    path = write(tmp_path, "a.label", b"LOC:city Which sister\xf0city \x85 has Los Angeles ?\n")
    assert read_file(path, Columns())[0].text == "Which sister\xf0city \x85 has Los Angeles ?"


def test_trec_files_in_utf_8_are_read_as_such(tmp_path: Path) -> None:
    path = write(tmp_path, "a.label", "HUM:ind Who was Pelé ?\n")
    assert read_file(path, Columns())[0].text == "Who was Pelé ?"


def test_faulty_trec_lines_are_reported_together(tmp_path: Path) -> None:
    lines = ["NUM:dist How far ?", "How far is Mars ?", "NUM:dist", "", "NUM: How far ?"]
    message = fault(write(tmp_path, "a.label", "\n".join(lines)))
    assert "3 faulty lines" in message
    assert "line 2: does not start with 'COARSE:fine '" in message
    assert "line 3: empty text" in message
    assert "line 5: does not start with" in message


def test_csv_takes_a_byte_order_mark_and_newlines_in_quotes(tmp_path: Path) -> None:
    text = 'text,category\r\n"My card says ""expired"",\nwhat now?",card_expired\r\n'
    text += "  I am still waiting on my card?  , card_arrival\r\n"
    path = write(tmp_path, "a.csv", codecs.BOM_UTF8 + text.encode())
    assert read_file(path, Columns()) == [CARD, ARRIVAL]


def test_tsv_keeps_commas_and_finds_columns_in_any_order_and_case(tmp_path: Path) -> None:
    path = write(tmp_path, "a.TSV", "id\tIntent\tUtterance\n7\tgreet\tHello, there\n")
    assert read_file(path, Columns()) == [Example("Hello, there", "greet")]


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "title,text,label,fine\nMars,How far?,NUM,dist\n")
    columns = Columns(text_column="title", label_column="fine")
    assert read_file(path, columns) == [Example("Mars", "dist")]


@pytest.mark.parametrize(
    ("header", "columns", "expected"),
    [
        ("body,label", Columns(), "--text-column"),
        ("text,kind", Columns(), "--label-column"),
        ("text,sentence,label", Columns(), "found 2"),
        ("text,text,label", Columns(), "found 2"),
        ("text,label", Columns(text_column="Text"), "'Text'"),
        ("text,label", Columns(label_column="text"), "both text and label"),
    ],
)
def test_a_wrong_column_is_refused_with_the_header(
    tmp_path: Path, header: str, columns: Columns, expected: str
) -> None:
    message = fault(write(tmp_path, "a.csv", f"{header}\nHow far?,NUM,x\n"), columns)
    assert expected in message
    assert "line 1" in message
    assert repr(header.split(",")[0]) in message


def test_a_file_without_header_is_refused_in_a_short_sentence(tmp_path: Path) -> None:
    message = fault(write(tmp_path, "a.csv", f"{'How far is it? ' * 1000},NUM\n"))
    assert "in the header" in message
    assert len(message) < 700


def test_faulty_csv_rows_are_reported_with_the_line_they_start_on(tmp_path: Path) -> None:
    rows = ["text,label", '"two\nlines",a', "one field", "x,y,z", '" ",a', "fine,", "ok,a"]
    message = fault(write(tmp_path, "a.csv", "\n".join(rows)))
    assert "4 faulty lines" in message
    assert "line 4: 1 fields where the header has 2" in message
    assert "line 5: 3 fields" in message
    assert "line 6: empty text" in message
    assert "line 7: empty label" in message


def test_of_many_faulty_lines_five_are_shown_and_all_counted(tmp_path: Path) -> None:
    message = fault(write(tmp_path, "a.csv", "text,label\n" + ",a\n" * 12))
    assert "12 faulty lines" in message
    assert message.count("empty text") == 5
    assert "line 6: empty text; and 7 more" in message


def test_a_quote_that_is_never_closed_does_not_swallow_the_file(tmp_path: Path) -> None:
    message = fault(write(tmp_path, "a.tsv", 'text\tlabel\nhi\ta\n"oh\ta\nhello\tb\nbye\tb\n'))
    assert "line 3: quotes do not match" in message


def test_a_field_longer_than_the_csv_modules_own_limit_is_read(tmp_path: Path) -> None:
    text = "news " * 40_000
    path = write(tmp_path, "a.csv", f"text,label\n{text},a\n")
    assert read_file(path, Columns()) == [Example(text.strip(), "a")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson"])
def test_json_lines_take_integer_labels_and_unescaped_line_separators(
    tmp_path: Path, name: str
) -> None:
    rows = [{"id": 1, "text": "one\u2028line", "label": 3}, {"label": "x", "text": "two"}]
    content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    examples = read_file(write(tmp_path, name, content), Columns())
    assert examples == [Example("one\u2028line", "3"), Example("two", "x")]


def test_faulty_json_lines_are_reported_together(tmp_path: Path) -> None:
    lines = [
        '{"text": "fine", "label": "a"}',
        '{"text": "cut',
        '["text", "label"]',
        '{"text": 5, "label": "a"}',
        '{"text": "no label"}',
        '{"text": "\\ud83d", "label": "half an emoji"}',
    ]
    message = fault(write(tmp_path, "a.jsonl", "\n".join(lines)))
    assert "5 faulty lines" in message
    assert "line 2: not JSON" in message
    assert "line 3: not a JSON object" in message
    assert "line 4: no string under 'text'" in message
    assert "line 5: neither a string nor an integer under 'label'" in message
    assert "line 6: half of a surrogate pair" in message


@pytest.mark.parametrize("label", ["true", "null", "1.5", "[]"])
def test_a_json_label_is_a_string_or_an_integer(tmp_path: Path, label: str) -> None:
    path = write(tmp_path, "a.jsonl", f'{{"text": "x", "label": {label}}}')
    assert "1 faulty line " in fault(path)


def test_json_nested_too_deeply_is_a_faulty_line(tmp_path: Path) -> None:
    assert "line 1: not JSON" in fault(write(tmp_path, "a.jsonl", "[" * 200_000))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_other_formats_must_be_utf_8_and_the_byte_is_named(tmp_path: Path, name: str) -> None:
    message = fault(write(tmp_path, name, b"text,label\ncaf\xe9,a\n"))
    assert "byte 0xE9 at position 14 (line 2)" in message


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.label"])
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str, content: str) -> None:
    assert "holds no examples" in fault(write(tmp_path, name, content))


def test_a_header_without_rows_is_refused(tmp_path: Path) -> None:
    assert "holds no examples" in fault(write(tmp_path, "a.csv", "text,label\n"))


def test_a_missing_file_a_folder_and_an_unknown_suffix_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in fault(tmp_path / "nowhere")
    (tmp_path / "folder.csv").mkdir()
    assert "cannot be read (Is a directory)" in fault(tmp_path / "folder.csv")
    assert ".label, .csv, .tsv, .jsonl" in fault(write(tmp_path, "a.parquet", "PAR1"))


def test_a_file_without_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(path: Path) -> bytes:  # chmod does not stop root
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path, "a.csv", "text,label\n")
    monkeypatch.setattr(Path, "read_bytes", deny)
    assert "Permission denied" in fault(path)


def test_options_that_do_not_fit_the_format_are_refused(tmp_path: Path) -> None:
    trec = write(tmp_path, "a.label", "NUM:dist How far ?")
    assert "no columns" in fault(trec, Columns(text_column="text"))
    table = write(tmp_path, "a.csv", "text,label\nx,a\n")
    assert "fine labels are for TREC" in fault(table, Columns(labels="fine"))


def test_contradictory_columns_are_refused_at_construction() -> None:
    with pytest.raises(InputError, match="both name 'x'"):
        Columns(text_column="x", label_column="x")
    with pytest.raises(InputError, match="'coarse' or 'fine'"):
        Columns(labels="medium")  # type: ignore[arg-type]


def test_first_few_says_how_many_it_left_out() -> None:
    assert first_few(list("abcde")) == "a, b, c, d, e"
    assert first_few(list("abcdefg")) == "a, b, c, d, e, and 2 more"


# What no format can hold: a text that is blank, and half of a surrogate pair.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(deadline=None)
@given(rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1), suffix=st.sampled_from(["csv", "tsv"]))
def test_what_the_csv_module_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], suffix: str
) -> None:
    path = tmp_path_factory.mktemp("csv") / f"a.{suffix}"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t" if suffix == "tsv" else ",")
        writer.writerows([("text", "label"), *rows])
    expected = [Example(text.strip(), label.strip()) for text, label in rows]
    assert read_file(path, Columns()) == expected


@settings(deadline=None)
@given(rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1), ascii_only=st.booleans())
def test_what_the_json_module_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], ascii_only: bool
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    lines = [json.dumps({"text": t, "label": n}, ensure_ascii=ascii_only) for t, n in rows]
    path.write_bytes("\n".join(lines).encode())
    expected = [Example(text.strip(), label.strip()) for text, label in rows]
    assert read_file(path, Columns()) == expected

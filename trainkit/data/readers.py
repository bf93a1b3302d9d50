"""Labelled texts from one file: TREC ``.label``, CSV, TSV or JSON lines in, examples out.

A file is read whole or not at all: every faulty line is collected, and one error reports them
together with their line numbers.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path

from trainkit.data.columns import Columns, find_columns
from trainkit.serve.errors import InputError


@dataclass(frozen=True)
class Example:
    """One text and its class; the text has no whitespace around it and is never empty."""

    text: str
    label: str


# A line's number, counted from 1, with its example - or with what is wrong in it.
Rows = Iterator[tuple[int, Example | str]]


def read_file(path: Path, columns: Columns) -> list[Example]:
    """Return the examples of one file in their order; its suffix chooses the format.

    Blank lines are passed over. Files are UTF-8, with or without a byte order mark; only TREC files
    may be latin-1, as the official ones are. Raises ``InputError`` if the file cannot be read, is
    empty, lacks a column or has faulty lines, and where ``columns`` does not fit the format.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist; check the path.")
    suffix = path.suffix.lower()
    if suffix not in PARSERS:
        raise InputError(
            f"{path} has the suffix {path.suffix!r}, which names no known format; "
            f"convert it to one of {', '.join(PARSERS)}."
        )
    _check_options(path, columns, is_trec=suffix == ".label")
    content = _decode(path, _read_bytes(path), latin1=suffix == ".label")
    examples: list[Example] = []
    faults: list[str] = []
    for line, row in PARSERS[suffix](path, content, columns):
        if isinstance(row, Example):
            examples.append(row)
        else:
            faults.append(f"line {line}: {row}")
    if faults:
        raise InputError(
            f"{path} has {len(faults)} faulty line{'s' * (len(faults) > 1)} to correct or remove: "
            f"{first_few(faults, '; ')}."
        )
    if not examples:
        raise InputError(f"{path} holds no examples; expected one labelled text a line.")
    return examples


def first_few(items: Sequence[str], separator: str = ", ") -> str:
    """Join the first five items and say how many more there are."""
    rest = [f"and {len(items) - 5} more"] if len(items) > 5 else []
    return separator.join([*items[:5], *rest])


def _check_options(path: Path, columns: Columns, is_trec: bool) -> None:
    named = columns.text_column is not None or columns.label_column is not None
    if is_trec and named:
        raise InputError(
            f"{path} is a TREC file, which has no columns; leave out --text-column and "
            "--label-column."
        )
    if not is_trec and columns.labels == "fine":
        raise InputError(
            f"{path} has one kind of label; fine labels are for TREC .label files; "
            "use --label-column to choose another column."
        )


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); expected a file you may read."
        ) from None


def _decode(path: Path, data: bytes, latin1: bool) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        if latin1:
            return data.decode("latin-1")
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02X} at position {error.start} "
            f"(line {line}); save the file as UTF-8."
        ) from None


def make_example(text: str, label: str) -> Example | str:
    """Return the stripped example, or what is wrong with it."""
    text, label = text.strip(), label.strip()
    if not text:
        return "empty text"
    if not label:
        return "empty label"
    return Example(text, label)


def _trec(path: Path, content: str, columns: Columns) -> Rows:
    # Not splitlines(): in latin-1, byte 0x85 would end a line.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        match = re.fullmatch(r"([^\s:]+):(\S+)(?:\s(.*))?", line.strip(), re.DOTALL)
        if match is None:
            yield number, "does not start with 'COARSE:fine '"
            continue
        coarse, fine, text = match.groups(default="")
        yield (
            number,
            make_example(text, coarse if columns.labels == "coarse" else f"{coarse}:{fine}"),
        )


def _separated(path: Path, content: str, columns: Columns, delimiter: str) -> Rows:
    # The module's own limit of 131,072 characters a field is a setting of the whole process.
    csv.field_size_limit(2**31 - 1)
    # Strict: otherwise a quote that is never closed swallows the rest of the file.
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    text = label = 0
    number = 1  # a quoted text may span lines: this is the row's first
    try:
        for fields in reader:
            if fields and not header:
                header = [name.strip() for name in fields]
                text, label = find_columns(f"{path}, line {number}", header, columns)
            elif fields and len(fields) != len(header):
                yield number, f"{len(fields)} fields where the header has {len(header)}"
            elif fields:
                yield number, make_example(fields[text], fields[label])
            number = reader.line_num + 1
    except csv.Error as error:
        yield number, f'quotes do not match ({error}); write a quote inside a quoted field as ""'


def _json_lines(path: Path, content: str, columns: Columns) -> Rows:
    text = label = ""
    # Not splitlines(): U+2028 may stand unescaped inside a JSON string.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"not JSON ({error})"
            continue
        if not isinstance(row, dict):
            yield number, "not a JSON object"
            continue
        if not text:
            names = list(row)
            found = find_columns(f"{path}, line {number}", names, columns)
            text, label = (names[index] for index in found)
        yield number, example_of(row.get(text), row.get(label), text, label)


def example_of(text: object, label: object, text_key: str, label_key: str) -> Example | str:
    """Return the example of two values of any type, or what is wrong with them."""
    if not isinstance(text, str):
        return f"no string under {text_key!r}"
    # Integral: numpy's integers too.
    if isinstance(label, bool) or not isinstance(label, str | Integral):
        return f"neither a string nor an integer under {label_key!r}"
    try:
        f"{text}{label}".encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair (\\ud800 to \\udfff), which no tokenizer can encode"
    return make_example(text, str(label))


PARSERS: dict[str, Callable[[Path, str, Columns], Rows]] = {
    ".label": _trec,
    ".csv": partial(_separated, delimiter=","),
    ".tsv": partial(_separated, delimiter="\t"),
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
}

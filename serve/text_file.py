"""The texts of a large file, in chunks that any process can read by itself.

One pass checks every line and finds the chunks; a chunk is three numbers. Text files have one text
per line; CSV, TSV and JSON lines files have a column of texts.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

from trainkit.serve.errors import InputError

CHUNK_ROWS = 1024
FIRST_FAULTS = 5
DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
SUFFIXES = (".txt", *DELIMITERS, *JSON_LINES)
MARK = b"\xef\xbb\xbf"  # a byte order mark
MOST_FIELD = 2**31 - 1


class Chunk(NamedTuple):
    """Some rows of a file: from which byte, how many bytes, and the number of their first line."""

    start: int
    size_bytes: int
    line: int


class TextRow(NamedTuple):
    """One text and the number of its (first) line, counted from 1."""

    line: int
    text: str


class _Fault(NamedTuple):
    line: int
    reason: str


class TextFile:
    """A file of texts; its suffix gives the format, and ``column`` is that of the texts.

    Blank lines of CSV and JSON lines are skipped; elsewhere an empty text is a fault. Raises
    ``InputError`` if the file cannot be read, has another format or lacks the column.
    """

    def __init__(self, path: Path, column: str = "text") -> None:
        if path.suffix.lower() not in SUFFIXES:
            raise InputError(
                f"{path} has the suffix {path.suffix!r}, which names no known format; convert it "
                f"to one of {', '.join(SUFFIXES)}."
            )
        self.path = path
        self.column = column
        self.delimiter = DELIMITERS.get(path.suffix.lower())
        self.is_json = path.suffix.lower() in JSON_LINES
        self.field = self.fields = 0
        if self.delimiter:
            header = self._header()
            if column not in header:
                raise InputError(
                    f"{path} has no column {column!r}; it has: {', '.join(header)}. "
                    "Name one with --text-column."
                )
            self.field, self.fields = header.index(column), len(header)

    def chunks(self, rows: int = CHUNK_ROWS) -> list[Chunk]:
        """Return the chunks; ``InputError`` names the first faulty lines, if any."""
        found: list[Chunk] = []
        faults: list[_Fault] = []  # the first
        faulty = 0
        with self._open() as file:
            lines = _Lines(file)
            begin, line, count = 0, 1, 0
            for row in self._rows(lines):
                if isinstance(row, _Fault):
                    faulty += 1
                    faults += [row] if faulty <= FIRST_FAULTS else []
                count += isinstance(row, TextRow)
                if count == rows:
                    found.append(Chunk(begin, lines.position - begin, line))
                    begin, line, count = lines.position, lines.number + 1, 0
            if count:
                found.append(Chunk(begin, lines.position - begin, line))
        if faults:
            first = "; ".join(f"line {fault.line}: {fault.reason}" for fault in faults)
            more = f"; and {faulty - FIRST_FAULTS} more" if faulty > FIRST_FAULTS else ""
            raise InputError(f"{self.path} has faulty lines to correct or remove: {first}{more}.")
        if not found:
            raise InputError(f"{self.path} has no texts; expected one per line.")
        return found

    def read(self, chunk: Chunk) -> list[TextRow]:
        """Return the rows of one chunk; ``InputError`` if the file changed since."""
        with self._open() as file:
            file.seek(chunk.start)
            rows = list(self._rows(_Lines(file, chunk)))
        if not rows or any(isinstance(row, _Fault) for row in rows):
            raise InputError(f"{self.path} was changed while it was read; start again.")
        return [row for row in rows if isinstance(row, TextRow)]

    def _open(self) -> BinaryIO:
        try:
            return self.path.open("rb")
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be read ({error.strerror}); check the path."
            ) from None

    def _header(self) -> list[str]:
        with self._open() as file:
            try:
                for fields in self._separated(_Lines(file)):
                    if fields:
                        return [name.strip() for name in fields]
            except (csv.Error, UnicodeDecodeError) as error:
                raise InputError(f"the header of {self.path} cannot be read: {error}.") from None
        raise InputError(f"{self.path} is empty; expected a header with a column of texts.")

    def _rows(self, lines: "_Lines") -> Iterator[TextRow | _Fault]:
        if self.delimiter:
            yield from self._separated_rows(lines)
            return
        for number, content in lines:
            if content.strip() or not self.is_json:
                row = _decoded(content, self.column) if self.is_json else _text(content)
                yield TextRow(number, row) if isinstance(row, str) else _Fault(number, row.args[0])

    def _separated(self, lines: "_Lines") -> Iterator[list[str]]:
        csv.field_size_limit(MOST_FIELD)  # of the process; the module's own is 131,072 characters
        # Strict: otherwise a quote that is never closed swallows the rest of the file.
        decoded = (content.decode() for _, content in lines)
        return csv.reader(decoded, delimiter=self.delimiter or ",", strict=True)

    def _separated_rows(self, lines: "_Lines") -> Iterator[TextRow | _Fault]:
        is_header = lines.begins_file
        begin = lines.number + 1  # a quoted text may span lines: this is the row's first
        try:
            for fields in self._separated(lines):
                if fields and is_header:
                    is_header = False
                elif fields and len(fields) != self.fields:
                    reason = f"{len(fields)} fields, but the header has {self.fields}"
                    yield _Fault(begin, reason)
                elif fields:
                    text = fields[self.field].strip()
                    yield TextRow(begin, text) if text else _Fault(begin, "empty text")
                begin = lines.number + 1
        except (csv.Error, UnicodeDecodeError) as error:
            is_text = isinstance(error, csv.Error)
            yield _Fault(begin, f"not CSV ({error})" if is_text else "not UTF-8")


class _Lines:
    """The lines of a file or of a chunk, and after each its number and the byte that follows."""

    def __init__(self, file: BinaryIO, chunk: Chunk | None = None) -> None:
        self.file = file
        self.position = chunk.start if chunk else 0
        self.number = chunk.line - 1 if chunk else 0
        self.end = chunk.start + chunk.size_bytes if chunk else None
        self.begins_file = self.position == 0

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        while self.end is None or self.position < self.end:
            content = self.file.readline()
            if not content:
                return
            first = self.position == 0
            self.position += len(content)
            self.number += 1
            yield self.number, content.removeprefix(MARK) if first else content


def _text(content: bytes) -> str | ValueError:
    """Return the text of a line, or what is wrong with it."""
    try:
        text = content.decode().strip()
    except UnicodeDecodeError:
        return ValueError("not UTF-8")
    return text or ValueError("empty text")


def _decoded(content: bytes, column: str) -> str | ValueError:
    """Return the text of a JSON line, or what is wrong with it."""
    try:
        row = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ValueError("not JSON")
    text = row.get(column) if isinstance(row, dict) else None
    if not isinstance(text, str):
        return ValueError(f"no string under {column!r}")
    return text.strip() or ValueError("empty text")

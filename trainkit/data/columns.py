"""Which column of a file is the text and which the label: a header in, two positions out."""

from collections.abc import Sequence
from textwrap import shorten
from typing import Literal, get_args

import msgspec

from trainkit.serve.errors import InputError

TEXT_COLUMNS = ("text", "sentence", "question", "utterance", "content")
LABEL_COLUMNS = ("label", "category", "class", "intent", "target")

Labels = Literal["coarse", "fine"]


class Columns(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where text and label stand in a file.

    ``labels`` is for TREC files: "coarse" makes ``NUM:dist`` the class ``NUM``, "fine" keeps it.
    The columns are for the other formats; ``None`` takes the usual name that is there.
    Raises ``InputError`` if the fields contradict one another.
    """

    labels: Labels = "coarse"
    text_column: str | None = None
    label_column: str | None = None

    def __post_init__(self) -> None:
        if self.labels not in get_args(Labels):
            raise InputError(f"labels is {self.labels!r}; expected 'coarse' or 'fine'.")
        if self.text_column is not None and self.text_column == self.label_column:
            raise InputError(
                f"--text-column and --label-column both name {self.text_column!r}; "
                "name two different columns."
            )


def find_columns(where: str, header: Sequence[str], columns: Columns) -> tuple[int, int]:
    """Return the positions of text and label in the header.

    The usual names match in any case, given names exactly. ``where`` (file and line) is for the
    ``InputError`` that is raised where not exactly one column matches.
    """
    text = _find(where, header, columns.text_column, TEXT_COLUMNS, "--text-column")
    label = _find(where, header, columns.label_column, LABEL_COLUMNS, "--label-column")
    if text == label:
        raise InputError(
            f"{where}: the column {header[text]!r} would be both text and label; "
            "name them with --text-column and --label-column."
        )
    return text, label


def _find(
    where: str, header: Sequence[str], name: str | None, usual: Sequence[str], option: str
) -> int:
    if name is None:
        wanted = f"one of {', '.join(usual)}"
        matches = [i for i, column in enumerate(header) if column.casefold() in usual]
    else:
        wanted = repr(name)
        matches = [i for i, column in enumerate(header) if column == name]
    if len(matches) != 1:
        # Where a file has no header, its first text stands here: keep the sentence short.
        found = shorten(", ".join(repr(column) for column in header), 300)
        raise InputError(
            f"{where}: expected exactly one column named {wanted}, found {len(matches)} "
            f"in the header {found}; choose it with {option}."
        )
    return matches[0]

"""A table of text for the terminal, Markdown, and (:mod:`trainkit.html`) HTML; records as CSV."""

import csv as csv_module
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from rich.console import RenderableType

RowStyle: TypeAlias = Literal["bad", "good"]
COLOURS: dict[RowStyle, str] = {"bad": "red", "good": "green"}


@dataclass(frozen=True)
class Table:
    """Columns and rows of text; printing it with rich lays it out on the terminal.

    The first column is aligned left and the others right, unless the table is not ``numeric``.
    ``notes`` are sentences below it. ``styles`` maps the index of a row to its style.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    notes: Sequence[str] = ()
    numeric: bool = True
    styles: Mapping[int, RowStyle] = field(default_factory=dict)

    def __rich_console__(self, *_: Any) -> "Iterator[RenderableType]":
        """Yield what rich prints. Cells are ``Text``: "[/x]" in a name is not markup."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        laid_out = RichTable(
            title=Text(self.title) if self.title else None,
            box=box.SIMPLE_HEAD,
            show_header=any(self.columns),
            show_edge=False,
            padding=(0, 0 if self.numeric else 1),
        )
        for place, column in enumerate(self.columns):
            figures = self.numeric and place > 0
            # Wide headings make tables wider than a terminal: they wrap to the width of the cells.
            width = max((len(row[place]) for row in self.rows), default=0) if figures else 80
            heading = textwrap.fill(column, max(1, width), break_long_words=False)
            laid_out.add_column(
                Text(heading),
                justify="right" if figures else "left",
                no_wrap=figures,
                overflow="fold",
            )
        for place, row in enumerate(self.rows):
            style = COLOURS.get(self.styles[place]) if place in self.styles else None
            laid_out.add_row(*map(Text, row), style=style)
        yield laid_out
        yield from map(Text, self.notes)


def markdown(table: Table) -> str:
    """Return a Markdown table between its title and notes, without a final newline."""
    rule = ["---", *["---:" if table.numeric else "---"] * (len(table.columns) - 1)]
    lines = [f"**{table.title}**", ""] if table.title else []
    lines += map(_markdown_row, (table.columns, rule, *table.rows))
    lines += [line for note in table.notes for line in ("", note)]
    return "\n".join(lines)


def _markdown_row(cells: Sequence[str]) -> str:
    plain = (" ".join(cell.split()).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(plain)} |"


def csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Return records as CSV, with a column for each key that any of them has."""
    written = io.StringIO()
    columns = list(dict.fromkeys(name for record in records for name in record))
    writer = csv_module.DictWriter(written, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return written.getvalue()

"""A report as one HTML page that needs nothing else: no network, no script, no file.

The page is ``templates/report.html``, which escapes all text.
"""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from trainkit.serve.errors import InputError
from trainkit.tables import Table


@dataclass(frozen=True)
class Figure:
    """A plot, given as an SVG document, with a title above and a caption below."""

    svg: bytes
    caption: str
    title: str = ""

    @property
    def uri(self) -> str:
        """Return the plot as a data URI."""
        return f"data:image/svg+xml;base64,{b64encode(self.svg).decode()}"


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    bullets: Sequence[str]


@dataclass(frozen=True)
class Code:
    """A command or other text in a monospaced font."""

    code: str


class Shaded(str):
    """A cell of a table with a background of the first colour: ``shade`` from 0 to 1."""

    shade: float

    def __new__(cls, text: str, shade: float) -> "Shaded":
        """Return a cell with its shade."""
        cell = super().__new__(cls, text)
        cell.shade = shade
        return cell


Block: TypeAlias = str | Table | Figure | Bullets | Code
"""A paragraph, or something else that stands in a section."""


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A report; ``warning`` stands in a box at its top, ``data`` is JSON in its ``#result``."""

    title: str
    summary: str
    sections: Sequence[Section] = field(default_factory=tuple)
    warning: str = ""
    data: str = ""


def render(page: Page) -> str:
    """Return the HTML; raises ``InputError`` if jinja2 is not installed."""
    try:
        from jinja2 import Environment, PackageLoader
    except ImportError as error:
        raise InputError("reports need jinja2; run: pip install 'trainkit-onnx[train]'") from error
    environment = Environment(
        loader=PackageLoader("trainkit"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html").render(page=page)

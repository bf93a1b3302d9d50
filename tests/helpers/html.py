"""Reports as a browser reads them: tags, text, and what would be fetched."""

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """Every tag with its attributes, the text, and what scripts hold."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "use"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open[-1:] == ["script"] else self.text).append(data)


def outside(content: str) -> list[str]:
    """Return what a browser would fetch."""
    found = []
    for tag, attributes in Page(content).tags:
        for name in ("src", "href", "xlink:href", "data", "srcset"):
            if (value := attributes.get(name)) and not value.startswith(("#", "data:")):
                found.append(f"{tag} {name} {value}")
    return found + re.findall(r"@import[^;]*|url\((?!#)[^)]*\)", content)

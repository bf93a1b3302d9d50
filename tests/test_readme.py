"""The README says what is true: its figures are the results', its links lead somewhere."""

import re
from pathlib import Path

import pytest

from trainkit.bench.studies.publish import DOCUMENTS as PUBLISHED
from trainkit.bench.studies.publish import filled

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    "README.md",
    "bench/studies/README.md",
    *sorted(f"docs/{path.name}" for path in DOCS.glob("*.md")),
]


def test_its_figures_are_those_of_the_results():
    for path in (path for pattern in PUBLISHED for path in ROOT.glob(pattern)):
        text = path.read_text(encoding="utf-8")
        assert filled(text, ROOT / "bench" / "results") == text


LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    path = ROOT / document
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def anchors(path):
    """Return the anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_first_forty_lines_show_the_way():
    top = "\n".join(README.splitlines()[:40])
    for needed in (
        "make demo",
        "make test",
        "trainkit train",
        "trainkit export",
        "Classifier.load",
    ):
        assert needed in top

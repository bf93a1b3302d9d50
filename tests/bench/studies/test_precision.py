"""The table of docs/precision.md is that of the results."""

from pathlib import Path

import msgspec

from trainkit.bench.studies.precision import PrecisionFigures, markdown

ROOT = Path(__file__).parents[3]


def test_the_table_of_the_document_is_made_of_the_results():
    content = (ROOT / "bench" / "results" / "precision.json").read_bytes()
    figures = msgspec.json.decode(content, type=PrecisionFigures)
    assert markdown(figures) in (ROOT / "docs" / "precision.md").read_text(encoding="utf-8")

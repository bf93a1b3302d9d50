"""Write the figures of ``bench/results/`` into README and docs, between their markers.

A block ``<!-- figures: NAME -->`` holds the Markdown of the file NAME.json, whose study is the part
of the name before a hyphen; ``BLOCKS`` are those made otherwise.
"""

import re
from collections.abc import Callable
from pathlib import Path

from trainkit.bench.result import Result, load
from trainkit.bench.studies import padding_scaling, speedups, trec
from trainkit.bench.studies.registry import find
from trainkit.bench.studies.study import RESULTS
from trainkit.serve.files import write_atomically

DOCUMENTS = ("README.md", "docs/*.md", "bench/studies/README.md")
BLOCK = re.compile(r"<!-- figures: (\S+) -->\n.*?<!-- end -->", re.DOTALL)
BLOCKS: dict[str, Callable[[Path], str]] = {
    "headline": lambda results: speedups.headline(_suites(results)),
    "speedups": lambda results: speedups.markdown(_suites(results)),
    "parity": lambda results: trec.parity_markdown(trec.STUDY.load(results / "trec.json")),
    "start": lambda results: trec.start_markdown(trec.STUDY.load(results / "trec.json")),
}


def _suites(results: Path) -> dict[str, Result]:
    return {path.stem: load(path) for path in sorted(results.glob("suite-*.json"))}


def filled(text: str, results: Path = RESULTS) -> str:
    """Return the text of a document with its blocks filled in again."""

    def block(match: re.Match[str]) -> str:
        name = match[1]
        if name in BLOCKS:
            figures = BLOCKS[name](results)
        else:
            study = find(name.partition("-")[0])
            figures = study.markdown(study.load(results / f"{name}.json"))
        return f"<!-- figures: {name} -->\n{figures.strip()}\n<!-- end -->"

    return BLOCK.sub(block, text)


def publish() -> None:
    """Write the figures of bench/results into the documents."""
    padding_scaling.write_plot(RESULTS / "padding_scaling.json")
    for pattern in DOCUMENTS:
        for path in Path().glob(pattern):
            text = path.read_text(encoding="utf-8")
            write_atomically(path, filled(text).encode())

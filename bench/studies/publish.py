"""Put the figures of ``bench/results/`` into README and docs, between their markers."""

import re
from collections.abc import Sequence
from pathlib import Path

from trainkit.bench.report.tables import markdown
from trainkit.bench.result import load
from trainkit.bench.studies import (
    accuracy,
    export_cost,
    families,
    footprint,
    grid,
    operators,
    padding_scaling,
    speedups,
    training,
)
from trainkit.bench.studies.serving import result as serving
from trainkit.bench.studies.trec import RESULTS, load_figures, parity_markdown, start_markdown
from trainkit.serve.files import write_atomically

__all__ = ["BLOCKS", "filled"]

BLOCKS = {
    "README.md": ("headline", "accuracy", "parity", "start", "runtimes"),
    "docs/parity.md": ("families", "exports"),
    "bench/studies/README.md": ("operators", "ablation-trec"),
    "docs/library.md": ("footprint",),
    "docs/load.md": ("serving",),
    "docs/rewrites.md": ("growth",),
    "docs/training.md": ("training",),
    "docs/runtimes.md": (
        "ahead",
        "grid-minilm",
        "grid-minilm-64",
        "suite-minilm-trec",
        "suite-minilm-banking77",
        "suite-minilm-newsgroups20",
        "suite-base-trec",
        "suite-base-banking77",
        "suite-base-newsgroups20",
    ),
}


def filled(text: str, names: Sequence[str], results: Path = RESULTS) -> str:
    """Return the text of a document with its ``<!-- figures: NAME -->`` blocks made anew."""
    for name in names:
        block = _block(name, results)
        marker = f"<!-- figures: {name} -->\n"
        pattern = f"{re.escape(marker)}.*?<!-- end -->"
        made = f"{marker}{block}\n<!-- end -->"
        parts = re.split(pattern, text, flags=re.DOTALL)
        assert len(parts) == 2, f"there must be one block '{name}', not {len(parts) - 1}"
        text = made.join(parts)
    return text


def _block(name: str, results: Path) -> str:
    if name == "accuracy":
        return accuracy.markdown(accuracy.load_accuracy(results / "accuracy.json"))
    if name == "parity":
        figures = load_figures(results / "trec.json")
        return parity_markdown(figures.models, figures.test_questions)
    if name == "start":
        return start_markdown(load_figures(results / "trec.json"))
    if name in ("ahead", "headline"):
        suites = {path.stem: load(path) for path in sorted(results.glob("suite-*.json"))}
        return speedups.markdown(suites) if name == "ahead" else speedups.headline(suites)
    path = results / f"{name}.json"
    if name == "exports":
        return export_cost.markdown(export_cost.load(path))
    if name == "families":
        return families.markdown(families.load(path))
    if name == "footprint":
        return footprint.markdown(footprint.load(path))
    if name.startswith("grid-"):
        return grid.markdown(load(path))
    if name == "growth":
        return padding_scaling.markdown(padding_scaling.load(path))
    if name == "operators":
        return operators.markdown(operators.load(path))
    if name == "training":
        return training.markdown(training.load(path))
    if name == "serving":
        return serving.markdown(serving.load(path))
    return markdown(load(path)).strip()


if __name__ == "__main__":
    for document, names in BLOCKS.items():
        path = Path(document)
        write_atomically(path, filled(path.read_text(encoding="utf-8"), names).encode())

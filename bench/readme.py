"""Put the figures of ``bench/results/`` into the README, between its markers."""

import re
import sys
from pathlib import Path

from trainkit.bench.figures import RESULTS, accuracy_markdown, load_figures, start_markdown
from trainkit.bench.result import load
from trainkit.bench.tables import markdown
from trainkit.serve.files import write_atomically

__all__ = ["filled"]


def filled(readme: str, results: Path = RESULTS) -> str:
    """Return the text with every ``<!-- figures: NAME -->`` block made anew."""
    figures = load_figures(results / "trec.json")
    blocks = {
        "accuracy": accuracy_markdown(figures),
        "start": start_markdown(figures),
        "runtimes": markdown(load(results / "runtimes.json")).strip(),
    }
    for name, block in blocks.items():
        marker = f"<!-- figures: {name} -->\n"
        pattern = f"{re.escape(marker)}.*?<!-- end -->"
        made = f"{marker}{block}\n<!-- end -->"
        parts = re.split(pattern, readme, flags=re.DOTALL)
        assert len(parts) == 2, f"the README needs one block '{name}', it has {len(parts) - 1}"
        readme = made.join(parts)
    return readme


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "README.md")
    write_atomically(path, filled(path.read_text(encoding="utf-8")).encode())

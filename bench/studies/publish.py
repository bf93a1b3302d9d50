"""Put the figures of ``bench/results/`` into README and docs, between their markers."""

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from trainkit.bench.report.tables import (
    engine_labels,
    machine,
    markdown,
    noise,
    rate_text,
    ratio_text,
)
from trainkit.bench.result import Measurement, Result, load
from trainkit.bench.studies import (
    accuracy,
    export_cost,
    families,
    footprint,
    grid,
    operators,
    padding_scaling,
    precision,
    speedups,
    training,
)
from trainkit.bench.studies.serving import result as serving
from trainkit.bench.studies.trec import RESULTS, load_figures, parity_markdown, start_markdown
from trainkit.serve.files import write_atomically

__all__ = ["BLOCKS", "filled"]

BLOCKS = {
    "README.md": ("headline",),
    "docs/library.md": ("footprint", "start"),
    "docs/load.md": ("serving",),
    "docs/parity.md": ("parity", "families", "exports"),
    "docs/precision.md": ("precision",),
    "docs/rewrites.md": ("growth",),
    "docs/runtimes.md": ("ahead", "grid-minilm", "suite-minilm-trec", "suite-base-newsgroups20"),
    "docs/training.md": ("accuracy", "training"),
    "bench/studies/README.md": ("operators", "ablation-trec"),
}


def filled(text: str, names: Sequence[str], results: Path = RESULTS) -> str:
    """Return the text of a document with its ``<!-- figures: NAME -->`` blocks filled in again."""
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
    if name == "precision":
        return precision.markdown(
            msgspec.json.decode(path.read_bytes(), type=precision.PrecisionFigures)
        )
    if name == "training":
        return training.markdown(training.load(path))
    if name == "serving":
        return serving.markdown(serving.load(path))
    if name.startswith("suite-"):
        return suite_markdown(load(path))
    return markdown(load(path)).strip()


def suite_markdown(result: Result) -> str:
    """Return one table of a suite with its workloads side by side: speed, ratio, accuracy."""
    headings, lines = ["engine"], []
    for workload in result.workloads:
        headings += [f"batch {workload.batch_size}: texts/s", "ratio"]
    for number, label in enumerate(engine_labels(result)):
        cells, accuracy = [label], "-"
        for workload in result.workloads:
            measured = next((one for one in workload.measurements if one.engine == number), None)
            cells += [rate_text(measured.texts_per_s), _ratio(measured)] if measured else "--"
            if measured and measured.accuracy is not None:
                accuracy = f"{100 * measured.accuracy:.1f}%"
        peak = (result.engines[number].peak_rss_bytes or 0) / 1e6
        lines.append(f"| {' | '.join(cells)} | {accuracy} | {peak:,.0f} |")
    head = f"| {' | '.join(headings)} | accuracy | peak MB |"
    lines = [head, "|---|" + "---:|" * (len(headings) + 1), *lines]
    texts = result.workloads[0].texts
    lines += ["", f"{texts} texts. {machine(result)}"]
    return "\n".join([*lines, *(["", noise(result)] if result.noisy else [])])


def _ratio(measured: Measurement) -> str:
    return ratio_text(measured.ratio) if measured.ratio else "baseline"


if __name__ == "__main__":
    for document, names in BLOCKS.items():
        path = Path(document)
        write_atomically(path, filled(path.read_text(encoding="utf-8"), names).encode())

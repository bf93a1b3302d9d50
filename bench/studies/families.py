"""Every family of Hugging Face classifiers, small and with random weights, through every export.

``python -m trainkit.bench.studies families`` writes ``bench/results/families.json``: families x
formats x precisions with the largest difference from Hugging Face's own forward and the label
agreement. Random weights of this size are harsher on a lower precision than trained ones are.
"""

import sys
import tempfile
from pathlib import Path

import msgspec

from tests.families import FAMILIES, random_source
from trainkit.bench.measure.environment import Environment, describe
from trainkit.data.readers import Example
from trainkit.data.splits import load_sample
from trainkit.export import parity
from trainkit.export.bundle_writer import PreparedSource, prepare
from trainkit.export.pipeline import write_model
from trainkit.export.settings import OPSET, ExportSettings
from trainkit.serve.errors import CheckFailedError
from trainkit.serve.files import pretty_json, write_atomically

__all__ = ["Families", "load", "markdown"]

RESULTS = Path("bench/results/families.json")
TEXTS = 350  # the rest of the 750 are the data for int8


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One export: how far it is from Hugging Face on the whole matrix, or why it was refused."""

    family: str
    format: str
    precision: str
    opset: int | None
    layout: str
    cases: int
    max_abs: float | None
    max_rel: float | None
    label_agreement: float | None
    refused: str = ""


class Families(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of ``families.json``."""

    command: list[str]
    environment: Environment
    rows: tuple[Row, ...]


EXPORTS = (
    ExportSettings(),
    ExportSettings(opset=18),
    ExportSettings(precision="fp16"),
    # The gate is open: random weights put many rows near a tie. The matrix judges all the same.
    ExportSettings(precision="int8", max_accuracy_drop=100, min_label_agreement=0),
    ExportSettings(format="torchscript"),
    ExportSettings(format="pt2"),
)


def measure(prepared: PreparedSource, family: str, settings: ExportSettings) -> Row:
    """Export in a scratch folder; a refusal is a row too."""
    source = prepared.source
    report: parity.ParityReport | None = None
    refused = ""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            written = write_model(
                source, prepared.cases, prepared.gate, settings, Path(scratch), lambda step: None
            )
            report = [stage.parity for stage in written.stages if stage.parity is not None][-1]
        except parity.ParityError as error:
            report, refused = error.report, str(error)
        except CheckFailedError as error:
            refused = str(error)
    return Row(
        family=family,
        format=settings.format,
        precision=settings.precision,
        opset=settings.opset if settings.format == "onnx" else None,
        layout="padded" if source.facts["padded_because"] else "packed",
        cases=report.cases if report else 0,
        max_abs=report.max_abs if report else None,
        max_rel=report.max_rel if report else None,
        label_agreement=report.label_agreement if report else None,
        refused=refused,
    )


def main() -> None:
    """Measure every family, and write the results."""
    rows = []
    for family in FAMILIES:
        prepared = _prepared(family)
        for settings in EXPORTS:
            rows.append(measure(prepared, family, settings))
            print(rows[-1], file=sys.stderr, flush=True)
    document = Families(
        command=["python", "-m", "trainkit.bench.studies.families"],
        environment=describe(),
        rows=tuple(rows),
    )
    write_atomically(RESULTS, pretty_json(document))


def _prepared(family: str) -> PreparedSource:
    """Prepare with the sample's questions as data, labelled as the model itself labels them.

    Random weights have no accuracy to lose; what is judged is whether the labels stay.
    """
    source = random_source(family)
    texts = [example.text for example in load_sample()[TEXTS:]]
    answers = source.classifier()(texts)
    data = [Example(text, answer.label) for text, answer in zip(texts, answers, strict=True)]
    return prepare(source, data)


def load(path: Path = RESULTS) -> Families:
    """Read ``families.json``."""
    return msgspec.json.decode(path.read_bytes(), type=Families)


def markdown(families: Families) -> str:
    """Lay the rows out: a family a line, an export a column."""
    columns = list(dict.fromkeys(_column(row) for row in families.rows))
    cells = {(row.family, _column(row)): _cell(row) for row in families.rows}
    layouts = {row.family: row.layout for row in families.rows}
    lines = [
        f"| family | layout | {' | '.join(columns)} |",
        f"|---|---|{'---|' * len(columns)}",
    ]
    for family, layout in layouts.items():
        row = " | ".join(cells[family, column] for column in columns)
        lines.append(f"| {family} | {layout} | {row} |")
    return "\n".join(lines)


def _column(row: Row) -> str:
    opset = f" {row.opset}" if row.opset not in (None, OPSET) else ""
    precision = f" {row.precision}" if row.precision != "fp32" else ""
    return f"{row.format}{opset}{precision}"


def _cell(row: Row) -> str:
    if row.max_rel is None or row.label_agreement is None:
        return "refused"
    numbers = f"{row.max_rel:.0e}, {100 * row.label_agreement:.4g} %"
    return f"refused ({numbers})" if row.refused else numbers


if __name__ == "__main__":
    main()

"""Every family of Hugging Face classifiers, small and with random weights, through every export.

Random weights of this size are harsher on a lower precision than trained ones are.
"""

import tempfile
from pathlib import Path
from typing import Literal

import msgspec

from tests.families import FAMILIES, random_source
from trainkit import tables
from trainkit.bench.files import ReportHead
from trainkit.bench.studies.study import Session, Study, head
from trainkit.data.readers import Example
from trainkit.data.splits import load_sample
from trainkit.export import parity
from trainkit.export.bundle_writer import PreparedSource, prepare
from trainkit.export.pipeline import write_model
from trainkit.export.settings import OPSET, ExportSettings
from trainkit.serve.errors import CheckFailedError
from trainkit.tables import Table

TEXTS = 350  # the rest of the 750 are the data for int8


class FamilyExport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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


class Families(ReportHead, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All exports of all families."""

    schema: Literal["trainkit-families/1"] = "trainkit-families/1"
    rows: tuple[FamilyExport, ...]


EXPORTS = (
    ExportSettings(),
    ExportSettings(opset=18),
    ExportSettings(precision="fp16"),
    # The gate is open: random weights put many rows near a tie. The matrix judges all the same.
    ExportSettings(precision="int8", max_accuracy_drop=100, min_label_agreement=0),
    ExportSettings(format="torchscript"),
    ExportSettings(format="pt2"),
)


def measure_export(prepared: PreparedSource, family: str, settings: ExportSettings) -> FamilyExport:
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
    return FamilyExport(
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


def measure(session: Session) -> Families:
    """Export every family in every way."""
    rows = []
    for family in FAMILIES:
        prepared = _prepared(family)
        for settings in EXPORTS:
            rows.append(measure_export(prepared, family, settings))
            session(f"{family}: {_column(rows[-1])} {_cell(rows[-1])}")
    return Families(**head(), rows=tuple(rows))


def _prepared(family: str) -> PreparedSource:
    """Prepare with the sample's questions as data, labelled as the model itself labels them.

    Random weights have no accuracy to lose; what is judged is whether the labels stay.
    """
    source = random_source(family)
    texts = [example.text for example in load_sample()[TEXTS:]]
    answers = source.classifier()(texts)
    data = [Example(text, answer.label) for text, answer in zip(texts, answers, strict=True)]
    return prepare(source, data)


def markdown(families: Families) -> str:
    """Lay the rows out: one line per family, one column per export."""
    columns = list(dict.fromkeys(_column(row) for row in families.rows))
    cells = {(row.family, _column(row)): _cell(row) for row in families.rows}
    layouts = {row.family: row.layout for row in families.rows}
    rows = [
        (family, layout, *(cells[family, column] for column in columns))
        for family, layout in layouts.items()
    ]
    return tables.markdown(Table(("family", "layout", *columns), rows, numeric=False))


def _column(row: FamilyExport) -> str:
    opset = f" {row.opset}" if row.opset not in (None, OPSET) else ""
    precision = f" {row.precision}" if row.precision != "fp32" else ""
    return f"{row.format}{opset}{precision}"


def _cell(row: FamilyExport) -> str:
    if row.max_rel is None or row.label_agreement is None:
        return "refused"
    numbers = f"{row.max_rel:.0e}, {100 * row.label_agreement:.4g}%"
    return f"refused ({numbers})" if row.refused else numbers


STUDY = Study("families", Families, measure, markdown)

"""How long an export takes, verification included, and how much memory it needs.

``trainkit export`` runs on MiniLM and on a model of BERT-base's size with random weights, each time
in a process of its own, in turns.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from trainkit import tables
from trainkit.bench.files import ReportHead
from trainkit.bench.studies.study import Session, Study, head
from trainkit.models.backbone import resolve
from trainkit.models.loading import quiet
from trainkit.serve.bundle import Manifest
from trainkit.serve.errors import CheckFailedError
from trainkit.tables import Table

LABELS = 6
ROUNDS = 3


class ExportRun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One export in fresh processes: wall seconds from start to end of each, and peak memory.

    ``cases`` of the parity matrix were run, in all stages of the manifest together.
    """

    model: str
    parameters: int
    format: str
    seconds: tuple[float, ...]
    peak_rss_bytes: int
    cases: int
    max_abs: float
    label_agreement: float
    rewritten: dict[str, int]


class ExportCost(ReportHead, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The exports of two models."""

    schema: Literal["trainkit-export-cost/1"] = "trainkit-export-cost/1"
    runs: tuple[ExportRun, ...]


class _Source(NamedTuple):
    name: str
    folder: Path
    parameters: int


def measure(session: Session) -> ExportCost:
    """Export both models in turns."""
    turns: list[list[ExportRun]] = []
    with tempfile.TemporaryDirectory() as scratch:
        minilm, base = _minilm(Path(scratch)), _base(Path(scratch))
        jobs = [(minilm, "onnx"), (minilm, "torchscript"), (minilm, "pt2"), (base, "onnx")]
        for turn in range(ROUNDS):
            turns.append([])
            for model, format in jobs:
                session(f"round {turn + 1} of {ROUNDS}: {model.name} to {format}")
                out = Path(scratch) / f"{model.name}-{format}-{turn}"
                turns[-1].append(_export(model, format, out))
                shutil.rmtree(out)
    return ExportCost(**head(), runs=tuple(map(_together, *turns)))


def _together(*runs: ExportRun) -> ExportRun:
    """The same export of all rounds as one."""
    seconds = tuple(second for run in runs for second in run.seconds)
    peak = max(run.peak_rss_bytes for run in runs)
    return msgspec.structs.replace(runs[0], seconds=seconds, peak_rss_bytes=peak)


def _minilm(scratch: Path) -> _Source:
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(
            resolve("minilm"), num_labels=LABELS
        )
    return _saved("MiniLM-L6", model, scratch)


def _base(scratch: Path) -> _Source:
    torch.manual_seed(0)
    config = BertConfig()
    config.num_labels = LABELS
    return _saved("BERT-base", AutoModelForSequenceClassification.from_config(config), scratch)


def _saved(name: str, model: torch.nn.Module, scratch: Path) -> _Source:
    folder = scratch / name
    with quiet():
        model.save_pretrained(folder)  # type: ignore[operator]  # of PreTrainedModel
        AutoTokenizer.from_pretrained(resolve("minilm")).save_pretrained(folder)
    return _Source(name, folder, sum(weight.numel() for weight in model.parameters()))


def _export(model: _Source, format: str, out: Path) -> ExportRun:
    command = [sys.executable, "-m", "trainkit", "export", str(model.folder)]
    command += ["--format", format, "--out", str(out), "--json"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise CheckFailedError(f"{' '.join(command)} ended with status {status}; run it to see.")
    (manifest,) = msgspec.json.decode(printed, type=list[Manifest])
    reports = [stage["parity"] for stage in manifest.stages if stage["parity"]]
    return ExportRun(
        model=model.name,
        parameters=model.parameters,
        format=format,
        seconds=(seconds,),
        peak_rss_bytes=usage.ru_maxrss * 1024,  # Linux counts in kibibytes
        cases=sum(report["cases"] for report in reports) + manifest.parity["cases"],
        max_abs=manifest.parity["max_abs"],
        label_agreement=manifest.parity["label_agreement"],
        rewritten={
            stage["name"]: stage["rewritten"] for stage in manifest.stages if stage["rewritten"]
        },
    )


def markdown(exports: ExportCost) -> str:
    """Lay the runs out as a table."""
    columns = (
        "model",
        "format",
        "parameters",
        "seconds: fastest, slowest",
        "peak memory",
        "cases run",
        "largest difference",
    )
    rows = [
        (
            run.model,
            run.format,
            f"{run.parameters / 1e6:.0f} M",
            f"{min(run.seconds):.0f}, {max(run.seconds):.0f}",
            f"{run.peak_rss_bytes / 1e9:.1f} GB",
            str(run.cases),
            f"{run.max_abs:.1e}",
        )
        for run in exports.runs
    ]
    return tables.markdown(Table(columns, rows))


STUDY = Study("export_cost", ExportCost, measure, markdown)

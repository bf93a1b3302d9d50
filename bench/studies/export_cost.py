"""How long an export takes, verification included, and how much memory: MiniLM and a base size.

``python -m trainkit.bench.studies export_cost`` runs ``trainkit export`` on two Hugging Face
folders, each in a process of its own, in turns, and writes ``bench/results/exports.json``. The
weights of the base size are random: its time and memory do not depend on them.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from trainkit.bench.measure.environment import Environment, describe
from trainkit.models.backbone import resolve
from trainkit.models.loading import quiet
from trainkit.serve.bundle import Manifest
from trainkit.serve.errors import CheckFailedError
from trainkit.serve.files import pretty_json, write_atomically

__all__ = ["Exports", "load", "main", "markdown"]

RESULTS = Path("bench/results/exports.json")
LABELS = 6
ROUNDS = 3


class Run(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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


class Exports(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of ``exports.json``."""

    command: list[str]
    environment: Environment
    runs: tuple[Run, ...]


class _Model(NamedTuple):
    name: str
    folder: Path
    parameters: int


def main() -> None:
    """Measure, and write the results."""
    turns: list[list[Run]] = []
    with tempfile.TemporaryDirectory() as scratch:
        minilm, base = _minilm(Path(scratch)), _base(Path(scratch))
        jobs = [(minilm, "onnx"), (minilm, "torchscript"), (minilm, "pt2"), (base, "onnx")]
        for turn in range(ROUNDS):
            turns.append([])
            for model, format in jobs:
                out = Path(scratch) / f"{model.name}-{format}-{turn}"
                turns[-1].append(_export(model, format, out))
                print(turns[-1][-1], file=sys.stderr, flush=True)
                shutil.rmtree(out)
    document = Exports(
        command=["python", "-m", "trainkit.bench.studies.export_cost"],
        environment=describe(),
        runs=tuple(map(_together, *turns)),
    )
    write_atomically(RESULTS, pretty_json(document))


def _together(*runs: Run) -> Run:
    """The same export of all rounds as one."""
    seconds = tuple(second for run in runs for second in run.seconds)
    peak = max(run.peak_rss_bytes for run in runs)
    return msgspec.structs.replace(runs[0], seconds=seconds, peak_rss_bytes=peak)


def _minilm(scratch: Path) -> _Model:
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(
            resolve("minilm"), num_labels=LABELS
        )
    return _saved("MiniLM-L6", model, scratch)


def _base(scratch: Path) -> _Model:
    torch.manual_seed(0)
    config = BertConfig()
    config.num_labels = LABELS
    return _saved("BERT-base", AutoModelForSequenceClassification.from_config(config), scratch)


def _saved(name: str, model: torch.nn.Module, scratch: Path) -> _Model:
    folder = scratch / name
    with quiet():
        model.save_pretrained(folder)  # type: ignore[operator]  # of PreTrainedModel
        AutoTokenizer.from_pretrained(resolve("minilm")).save_pretrained(folder)
    return _Model(name, folder, sum(weight.numel() for weight in model.parameters()))


def _export(model: _Model, format: str, out: Path) -> Run:
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
    return Run(
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


def load(path: Path = RESULTS) -> Exports:
    """Read ``exports.json``."""
    return msgspec.json.decode(path.read_bytes(), type=Exports)


def markdown(exports: Exports) -> str:
    """Lay the runs out as a table."""
    lines = [
        "| model | parameters | format | seconds: fastest, slowest | peak memory | cases run | "
        "largest difference |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {run.model} | {run.parameters / 1e6:.0f} M | {run.format} | "
        f"{min(run.seconds):.0f}, {max(run.seconds):.0f} | "
        f"{run.peak_rss_bytes / 1e9:.1f} GB | {run.cases} | {run.max_abs:.1e} |"
        for run in exports.runs
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""From nothing to the first answer: a fresh Python process, a bundle opened, one text classified.

What a command line tool, a serverless function or a restarted service waits for. Each run is a new
process; the files are in the system's cache after the first.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from trainkit.bench.race.worker_process import last_line
from trainkit.serve.bundle import open_bundle
from trainkit.serve.errors import CheckFailedError, InputError

# The first line it prints stops the clock; the second is about itself, and looked up afterwards.
PROGRAM = """
import sys
from trainkit.serve import Classifier
classifier = Classifier.load(sys.argv[1])  # kept: its memory is measured below
print(classifier(sys.argv[2]).label, flush=True)
found = [name for name in ("torch", "transformers", "onnx") if name in sys.modules]
import json
from trainkit.bench.measure.procfs import peak_rss_bytes, rss_bytes
memory = {"peak_rss_bytes": peak_rss_bytes(), "rss_bytes": rss_bytes()}
print(json.dumps({**memory, "heavy_modules": found}))
"""


class _About(msgspec.Struct):
    peak_rss_bytes: int | None
    rss_bytes: int | None
    heavy_modules: tuple[str, ...]


class ColdRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One process: wall seconds from before its start to its answer, and its memory by then.

    ``peak_rss_bytes`` is the most that was resident, ``rss_bytes`` what still is; None where it was
    not measured.
    """

    seconds: float
    peak_rss_bytes: int | None
    rss_bytes: int | None = None


class ColdStart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All runs, the median of their seconds, and the largest of their peaks.

    ``heavy_modules`` lists those of torch, transformers and onnx that serving imported: none, if
    all is well.
    """

    median_s: float
    peak_rss_bytes: int | None
    heavy_modules: tuple[str, ...]
    runs: tuple[ColdRun, ...]


class HelpTime(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Wall seconds of ``trainkit --help``, each time, and their median."""

    median_s: float
    runs_s: tuple[float, ...]


def measure(bundle: Path, text: str, runs: int = 7) -> ColdStart:
    """Classify ``text`` in ``runs`` fresh processes.

    Raises ``InputError`` if ``bundle`` is not a sound ONNX bundle, and ``CheckFailedError`` if a
    process fails.
    """
    manifest = open_bundle(bundle).manifest
    if manifest.format != "onnx":
        raise InputError(f"{bundle} is {manifest.format}, served by torch; give an ONNX bundle.")
    _check_runs(runs)
    command = [sys.executable, "-P", "-c", PROGRAM, str(bundle), text]
    measured = [_first_line(command, f"serving {bundle}") for _ in range(runs)]
    abouts = [msgspec.json.decode(rest, type=_About) for _, rest in measured]
    peaks = [about.peak_rss_bytes for about in abouts]
    kept = [about.rss_bytes for about in abouts]
    seconds = [s for s, _ in measured]
    return ColdStart(
        median_s=statistics.median(seconds),
        peak_rss_bytes=max((peak for peak in peaks if peak is not None), default=None),
        heavy_modules=tuple(sorted({name for about in abouts for name in about.heavy_modules})),
        runs=tuple(map(ColdRun, seconds, peaks, kept)),
    )


def help_seconds(runs: int = 7) -> HelpTime:
    """Time ``python -m trainkit --help``, to its end; raises ``CheckFailedError`` if it fails."""
    _check_runs(runs)
    command = [sys.executable, "-P", "-m", "trainkit", "--help"]
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        ended = subprocess.run(command, capture_output=True, check=False)
        seconds.append(time.perf_counter() - start)
        _check_status("trainkit --help", ended.returncode, ended.stderr)
    return HelpTime(statistics.median(seconds), tuple(seconds))


def _check_runs(runs: int) -> None:
    if runs < 1:
        raise InputError(f"runs must be at least 1, not {runs}.")


def _first_line(command: Sequence[str], what: str) -> tuple[float, bytes]:
    """Start a process; returns the seconds to its first line, and what it printed after that."""
    # Its standard error goes to a file: an unread pipe would fill up and block it.
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process:
            assert process.stdout is not None
            process.stdout.readline()
            seconds = time.perf_counter() - start
            rest = process.stdout.read()
        errors.seek(0)
        _check_status(what, process.returncode, errors.read())
    return seconds, rest


def _check_status(what: str, status: int, errors: bytes) -> None:
    if status:
        reason = last_line(errors.decode(errors="replace"))
        raise CheckFailedError(f"{what} ended with status {status}: {reason}")

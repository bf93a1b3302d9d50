"""Results as JSON files: written whole or not at all, and read back as the same struct."""

import os
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from trainkit.bench.measure.environment import Environment
from trainkit.serve.errors import InputError
from trainkit.serve.files import write_atomically

T = TypeVar("T")
LINE_LENGTH = 2000


class ReportHead(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every result begins with.

    ``command`` is what the user typed. If ``noisy``, ``noisy_because`` gives the reasons to trust
    the timings less.
    """

    schema: str
    command: tuple[str, ...]
    date: datetime
    environment: Environment
    noisy: bool = False
    noisy_because: tuple[str, ...] = ()


def json_lines(report: Any) -> bytes:
    """Encode a struct as JSON in which every value that fits on a line has one of its own."""
    return (_lines(msgspec.to_builtins(report), "") + "\n").encode()


def _lines(value: Any, indent: str) -> str:
    compact = msgspec.json.encode(value).decode()
    if (len(compact) <= LINE_LENGTH and indent) or not isinstance(value, dict | list | tuple):
        return compact
    deeper = indent + " "
    if isinstance(value, dict):
        parts = [
            f"{msgspec.json.encode(key).decode()}: {_lines(one, deeper)}"
            for key, one in value.items()
        ]
    else:
        parts = [_lines(one, deeper) for one in value]
    left, right = "{}" if isinstance(value, dict) else "[]"
    return f"{left}\n{deeper}" + f",\n{deeper}".join(parts) + f"\n{indent}{right}"


def write(path: Path, content: bytes) -> None:
    """Write a file, creating its folder; raises ``InputError`` if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}); choose another file."
        ) from None


def read(path: Path, kind: type[T], command: str) -> T:
    """Read a JSON report, which ``command`` creates; raises ``InputError`` for any other file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a report.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is not a report of this trainkit ({error}); make one with: {command}"
        ) from None


def check_writable(path: Path) -> None:
    """Raise ``InputError`` if :func:`write` could not write ``path``, which is left as it is."""
    home = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not home.is_dir() or not os.access(home, os.W_OK):
        raise InputError(
            f"{path} cannot be written: a file in a writable directory is expected; choose "
            "another file."
        )

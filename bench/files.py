"""Reports as files: written whole or not at all, read again as the struct that they were."""

from pathlib import Path
from typing import TypeVar

import msgspec

from trainkit.serve.errors import InputError
from trainkit.serve.files import write_atomically

__all__ = ["read", "write"]

T = TypeVar("T")


def write(path: Path, content: bytes) -> None:
    """Write a file that the user named, in a folder that is made; ``InputError`` where it fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}); choose another file."
        ) from None


def read(path: Path, kind: type[T], command: str) -> T:
    """Read a JSON report; ``InputError`` where it is no ``kind``, which ``command`` makes."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a report.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is not a report of this trainkit ({error}); make one with: {command}"
        ) from None

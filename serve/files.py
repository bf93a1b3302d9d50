"""Files that are there whole and unchanged, or not at all."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import msgspec


class FileInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file must be to be the one that was written."""

    sha256: str
    size_bytes: int


def file_info(path: Path) -> FileInfo:
    """Hash and measure a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileInfo(digest, path.stat().st_size)


class Checksummed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A document that knows when it was changed.

    ``sha256`` is over its own canonical JSON without this field.
    """

    sha256: str = ""

    def digest(self) -> str:
        """Hash everything but the hash itself."""
        plain = msgspec.structs.replace(self, sha256="")
        # Sorted: a later version may declare its fields in another order.
        return hashlib.sha256(msgspec.json.encode(plain, order="sorted")).hexdigest()

    def with_checksum(self) -> Self:
        """Return the document with its hash, and as it will come back from JSON.

        There, tuples inside a dict are lists, and keys are strings: a hash over anything else
        would not be the one that a reader computes.
        """
        read = msgspec.json.decode(msgspec.json.encode(self), type=type(self))
        return msgspec.structs.replace(read, sha256=read.digest())

    @property
    def is_valid(self) -> bool:
        """Tell whether the hash is that of the content."""
        return self.sha256 == self.digest()


def pretty_json(document: Any) -> bytes:
    """Encode structs, dicts and lists as indented JSON that ends with a newline."""
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it: it is never there by half."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove those of ``folders``, innermost first, that hold nothing."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

"""PyTorch's zip archives, copied without what names the machine that wrote them."""

from collections.abc import Callable
from pathlib import Path

import torch

# The writer adds these by itself.
VERSIONS = ("version", ".data/version")
OWN = (*VERSIONS, ".data/serialization_id", "byteorder")


def copy_archive(source: Path, target: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Copy record by record; ``change`` gets name and bytes, and returns new ones, or None.

    The archive's version is kept: by an older one, PyTorch would read its operators as they once
    were, a division of integers as one that rounds, say.
    """
    reader = torch._C.PyTorchFileReader(str(source))
    writer = torch._C.PyTorchFileWriter(str(target))
    for name in reader.get_all_records():
        if name in VERSIONS:
            writer.set_min_version(int(reader.get_record(name)))
        if name in OWN:
            continue
        record = change(name, reader.get_record(name))
        if record is not None:
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()

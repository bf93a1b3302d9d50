"""Classifies a file of texts on this machine; writes JSON lines in the file's order.

Each chunk runs in one thread on one core, so that results do not depend on the number of workers.
:mod:`trainkit.serve.ray_predict` does the same in processes.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from trainkit.serve.classifier import Classifier
from trainkit.serve.cores import usable_cores
from trainkit.serve.encoding import Text
from trainkit.serve.errors import InputError
from trainkit.serve.text_file import Chunk, TextFile

Classify = Callable[[Sequence[Text]], Sequence[Any]]


def answers(classify: Classify, file: TextFile, chunk: Chunk) -> bytes:
    """Return a JSON line for each text of the chunk: its line in the file and the prediction."""
    rows = file.read(chunk)
    predictions = classify([row.text for row in rows])
    lines = (
        msgspec.json.encode({**row._asdict(), **prediction._asdict()})
        for row, prediction in zip(rows, predictions, strict=True)
    )
    return b"\n".join(lines) + b"\n"


def thread_answers(
    bundle: Path, file: TextFile, chunks: Sequence[Chunk], workers: int | None = None
) -> Iterator[bytes]:
    """Yield the answers of each chunk in order, computed by ``workers`` threads on one ONNX model.

    ``workers`` None is one per core. Raises ``InputError`` if the bundle is damaged.
    """
    classify = Classifier.load(bundle, threads=1)
    with ThreadPoolExecutor(workers or usable_cores(), "trainkit-answers") as pool:
        yield from pool.map(partial(answers, classify, file), chunks)


def write(path: Path, parts: Iterable[bytes]) -> int:
    """Write the parts one after the other, whole or not at all; returns the number of lines."""
    if path.is_dir():
        raise InputError(f"{path} is a directory; name a file in it.")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    count = 0
    try:
        try:
            file = unfinished.open("wb")
        except OSError as error:
            raise InputError(
                f"{path} cannot be written ({error.strerror}); check the path."
            ) from None
        with file:
            for part in parts:
                file.write(part)
                count += part.count(b"\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return count

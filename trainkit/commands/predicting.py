"""``trainkit predict``."""

import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from trainkit.serve.errors import InputError

__all__ = ["predict"]

CHUNK = 1024  # lines read and answered at a time, however long the input is


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("texts", nargs=-1)
def predict(bundle: Path, texts: tuple[str, ...]) -> None:
    """Classify TEXTS, or the lines of standard input; one JSON object a line comes out.

    Its keys: text, label, score, scores of all labels, and truncated, which is true where the text
    is longer than the model takes and only its kept part was read.

    \b
    trainkit predict runs/latest/onnx "How far is Mars?"
    trainkit predict runs/latest/onnx < questions.txt
    """
    import msgspec

    from trainkit.export.runtimes import open_classifier

    classifier = open_classifier(bundle)
    given = iter(texts) if texts else lines(sys.stdin.buffer)
    while chunk := list(itertools.islice(given, CHUNK)):
        for text, prediction in zip(chunk, classifier(chunk), strict=True):
            answer = {"text": text, **prediction._asdict()}
            sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.flush()


def lines(stream: Iterable[bytes]) -> Iterator[str]:
    """Yield the lines, stripped; ``InputError`` names the first that is empty or no text."""
    for number, line in enumerate(stream, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            raise InputError(
                f"line {number} of standard input is not UTF-8; save it as UTF-8."
            ) from None
        if not text:
            raise InputError(f"line {number} of standard input is empty; remove it.")
        yield text

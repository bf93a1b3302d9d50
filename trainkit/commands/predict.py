"""``trainkit predict``."""

import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trainkit.commands.common import A_PATH
from trainkit.commands.options import command, option
from trainkit.serve.errors import InputError

if TYPE_CHECKING:
    from trainkit.serve.text_file import Chunk, TextFile

CHUNK = 1024  # lines read and answered at a time, however long the input is


@command()
@click.argument("bundle", type=A_PATH)
@click.argument("texts", nargs=-1)
@option(
    "--file",
    type=A_PATH,
    help="File whose texts are classified instead: .txt, .csv, .tsv, .jsonl or .ndjson.",
)
@option("--text-column", help="Column (or JSON key) of the texts of --file.  [default: text]")
@option("--output", type=A_PATH, help="File to write the answers to --file to.")
@option("--ray", is_flag=True, help="Classify --file in several processes, with Ray Data.")
@option(
    "--workers",
    type=click.IntRange(min=1),
    help="Parts of --file classified at once, on one core each.  [default: one per core]",
)
def predict(
    bundle: Path,
    texts: tuple[str, ...],
    file: Path | None,
    text_column: str | None,
    output: Path | None,
    ray: bool,
    workers: int | None,
) -> None:
    """Classify TEXTS, or the lines of standard input, and print one JSON object per line.

    Its keys are text, label, score, scores (of all labels), and truncated, which is true if the
    text was longer than the model takes and only a part of it was read. With --file there is also
    line, the number of the text's line; the answers are in the file's order.

    \b
    trainkit predict runs/latest/onnx "How far is Mars?"
    trainkit predict runs/latest/onnx < questions.txt
    trainkit predict runs/latest/onnx --ray --file questions.csv --output answers.jsonl
    """
    if file is not None and output is not None:
        if texts:
            raise InputError("give texts or --file, not both.")
        predict_file(bundle, file, text_column or "text", output, workers, ray=ray)
        return
    if file is not None or output is not None or ray or workers or text_column:
        raise InputError("--ray, --workers and --text-column need --file and --output; give both.")
    import msgspec

    from trainkit.export.runtimes import open_classifier

    classifier = open_classifier(bundle)
    given = iter(texts) if texts else lines(sys.stdin.buffer)
    while chunk := list(itertools.islice(given, CHUNK)):
        for text, prediction in zip(chunk, classifier(chunk), strict=True):
            answer = {"text": text, **prediction._asdict()}
            sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.flush()


def predict_file(
    bundle: Path, path: Path, column: str, output: Path, workers: int | None, *, ray: bool
) -> None:
    """Check the whole file, then answer it: in this process, or with Ray."""
    from trainkit.serve.file_answers import write
    from trainkit.serve.text_file import TextFile

    file = TextFile(path, column)
    parts = _parts(bundle, file, file.chunks(), workers, ray=ray)
    click.echo(f"{write(output, parts)} answers in {output}", err=True)


def _parts(
    bundle: Path, file: "TextFile", chunks: "list[Chunk]", workers: int | None, *, ray: bool
) -> Iterator[bytes]:
    """Choose how the chunks are answered; PyTorch computes one after the other on all cores."""
    from trainkit.export.runtimes import open_classifier
    from trainkit.serve.bundle import MANIFEST, open_bundle
    from trainkit.serve.file_answers import answers, thread_answers
    from trainkit.serve.ray_predict import ray_answers

    if ray:
        return ray_answers(bundle, file, chunks, workers)
    if (bundle / MANIFEST).is_file() and open_bundle(bundle).manifest.format == "onnx":
        return thread_answers(bundle, file, chunks, workers)
    if workers:
        raise InputError(
            f"--workers is for ONNX bundles, and PyTorch computes {bundle} on all cores; leave it "
            "out, or export to ONNX."
        )
    classifier = open_classifier(bundle)
    return (answers(classifier, file, chunk) for chunk in chunks)


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

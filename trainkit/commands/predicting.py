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
@click.option(
    "--file",
    type=click.Path(path_type=Path),
    help="Classify a file's texts instead: .txt, .csv, .tsv, .jsonl or .ndjson.",
)
@click.option("--text-column", help="Column (or JSON key) of FILE's texts.  [default: text]")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Where the answers to FILE are written."
)
@click.option("--ray", is_flag=True, help="Classify FILE in several processes, with Ray Data.")
@click.option(
    "--workers", type=click.IntRange(min=1), help="Of --ray.  [default: one for each core]"
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
    """Classify TEXTS, or the lines of standard input; one JSON object a line comes out.

    Its keys: text, label, score, scores of all labels, and truncated, which is true where the text
    is longer than the model takes and only its kept part was read. For a FILE also line, the number
    of the text's line; the answers come in the file's order.

    \b
    trainkit predict runs/latest/onnx "How far is Mars?"
    trainkit predict runs/latest/onnx < questions.txt
    trainkit predict runs/latest/onnx --ray --file questions.csv --output answers.jsonl
    """
    if workers and not ray:
        raise InputError("--workers is for --ray; give both or neither.")
    if file is not None and output is not None:
        if texts:
            raise InputError("give texts or --file, not both.")
        predict_file(bundle, file, text_column or "text", output, workers, ray=ray)
        return
    if file is not None or output is not None or ray or text_column:
        raise InputError("--ray and --text-column need --file and --output; give both.")
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
    from trainkit.serve.ray_predict import answers, ray_answers, write
    from trainkit.serve.text_file import TextFile

    file = TextFile(path, column)
    chunks = file.chunks()
    if ray:
        parts = ray_answers(bundle, file, chunks, workers)
    else:
        from trainkit.export.runtimes import open_classifier

        classifier = open_classifier(bundle)
        parts = (answers(classifier, file, chunk) for chunk in chunks)
    click.echo(f"{write(output, parts)} answers in {output}", err=True)


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

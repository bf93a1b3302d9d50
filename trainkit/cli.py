"""The ``trainkit`` command: options in, one worker called, its report printed.

Workers are imported inside the commands, so that ``--help`` needs click alone. Exit codes: 0 done,
1 a check failed, 2 wrong usage or bad input.
"""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import click

from trainkit import __version__
from trainkit.serve.errors import InputError, TrainkitError

if TYPE_CHECKING:
    from trainkit.data.columns import Columns, Labels
    from trainkit.data.readers import Example
    from trainkit.models.config import Kind
    from trainkit.serve.bundle import Format
    from trainkit.trainer.config import TrainConfig

__all__ = ["main"]

SplitName: TypeAlias = Literal["train", "valid", "test", "all"]
Command = TypeVar("Command", bound=Callable[..., Any])

# What `pip install trainkit[...]` brings each library that the base install leaves out.
EXTRAS = {
    "torch": "train",
    "transformers": "train",
    "safetensors": "train",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxscript": "export",
    "psutil": "bench",
}


PREDICT_CHUNK = 1024  # lines read and answered at a time, however long the input is


class Failure(click.ClickException):
    """One sentence on standard error, and the exit code that its kind of error has."""

    def __init__(self, error: TrainkitError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]  # click declares a class variable


class Trainkit(click.Group):
    """A group that turns our own errors, and a missing extra, into one clear sentence."""

    def invoke(self, context: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(context)
        except TrainkitError as error:
            raise Failure(error) from None
        except ModuleNotFoundError as error:
            extra = EXTRAS.get((error.name or "").split(".")[0])
            if extra is None:
                raise
            message = f"this command needs {error.name}; run: pip install 'trainkit[{extra}]'"
            raise Failure(InputError(message)) from None


def data_options(command: Command) -> Command:
    """Add the options that say how a data file is read."""
    for option in (
        click.option("--label-column", help="Column (or JSON key) of the label."),
        click.option("--text-column", help="Column (or JSON key) of the text."),
        click.option(
            "--labels",
            type=click.Choice(["coarse", "fine"]),
            default="coarse",
            show_default=True,
            help="Which label of a TREC file to take.",
        ),
    ):
        command = option(command)
    return command


def columns(labels: "Labels", text_column: str | None, label_column: str | None) -> "Columns":
    """Gather what :func:`data_options` adds."""
    from trainkit.data.columns import Columns

    return Columns(labels=labels, text_column=text_column, label_column=label_column)


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document instead of tables."
)


def print_json(document: Any) -> None:
    """Print one document on standard output."""
    import msgspec

    encoded = msgspec.json.format(msgspec.json.encode(document), indent=2)
    sys.stdout.buffer.write(encoded + b"\n")
    sys.stdout.flush()


@click.group(cls=Trainkit, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="trainkit")
def cli() -> None:
    """Train a small text classifier, export it with proof, serve it without torch.

    \b
    trainkit train --data sample --model prefix --backbone minilm
    trainkit export --format onnx
    trainkit predict runs/latest/onnx "How far is Mars?"
    """


@cli.group()
def data() -> None:
    """Look at labelled texts, or fetch the TREC questions.

    \b
    trainkit data stats questions.csv
    """


@data.command("stats")
@click.argument("source")
@click.option("--test", type=click.Path(path_type=Path), help="A file that is the test set.")
@click.option("--seed", default=0, show_default=True, help="Of the split, where one is made.")
@click.option(
    "--tokenizer", help="Count tokens with a backbone's tokenizer: minilm, a folder or hub id."
)
@data_options
@json_option
def data_stats(
    source: str, test: Path | None, seed: int, tokenizer: str | None, as_json: bool, **how: Any
) -> None:
    """Count classes, lengths, duplicates and leaks of SOURCE: a file, a folder, or 'sample'.

    \b
    trainkit data stats questions.csv --text-column question --label-column topic
    """
    from trainkit.console import stdout
    from trainkit.data.splits import load
    from trainkit.data.statistics import describe, print_statistics

    splits = load(source, columns(**how), seed, test)
    statistics = describe(splits, token_counter(tokenizer, splits.train))
    if as_json:
        print_json(statistics)
    else:
        print_statistics(statistics, stdout)


def token_counter(
    name: str | None, train: "Sequence[Example]"
) -> Callable[[Sequence[str]], list[int]]:
    """Return a function that counts tokens: a backbone's, or those of the word vocabulary."""
    if name is not None:
        from trainkit.models.backbone import pretrained_tokenizer

        tokenizer = pretrained_tokenizer(name)
    else:
        from trainkit.data.vocabulary import word_tokenizer

        tokenizer = word_tokenizer([example.text for example in train])
    return lambda texts: [len(encoding) for encoding in tokenizer.encode_batch(list(texts))]


@data.command("trec")
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path),
    help="A folder that holds the two files already, for machines without a network.",
)
@click.option(
    "--to", "target", type=click.Path(path_type=Path), default=Path("data/trec"), show_default=True
)
def data_trec(source: Path | None, target: Path) -> None:
    """Fetch the official TREC question files and check their sha256.

    \b
    trainkit data trec --to data/trec
    """
    from trainkit.data.trec import fetch

    for path in fetch(target, source):
        click.echo(path)


@cli.command()
@click.option("--data", "source", required=True, help="A file, a folder, or 'sample'.")
@click.option("--test", type=click.Path(path_type=Path), help="A file that is the test set.")
@click.option(
    "--model",
    "kind",
    type=click.Choice(["simple", "prefix", "finetune"]),
    required=True,
    help="From scratch; a frozen encoder with trained prefixes; or all weights of an encoder.",
)
@click.option("--backbone", help="minilm, a Hugging Face folder, or a hub id.")
@click.option("--prefix-length", default=16, show_default=True, help="Trained positions a layer.")
@click.option("--max-length", type=int, help="Tokens a text is cut to. [default: the encoder's]")
@click.option("--dropout", type=float, help="[default: 0.1 with a backbone, else 0.5]")
@click.option("--min-count", default=2, show_default=True, help="Rarer words are [UNK].")
@click.option("--epochs", type=int)
@click.option("--batch-size", type=int)
@click.option("--learning-rate", type=float, help="Of the encoder or its prefix.")
@click.option("--head-learning-rate", type=float)
@click.option("--weight-decay", type=float)
@click.option("--warmup-share", type=float, help="Of all steps.")
@click.option("--label-smoothing", type=float)
@click.option("--patience-epochs", type=int, help="Stop after so many without a better accuracy.")
@click.option("--seed", type=int, help="One seed makes a run repeatable.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
@click.option("--name", help="Of the run's folder. [default: model and time]")
@data_options
@json_option
def train(
    source: str,
    test: Path | None,
    kind: "Kind",
    runs: Path,
    name: str | None,
    as_json: bool,
    labels: "Labels",
    text_column: str | None,
    label_column: str | None,
    **settings: Any,
) -> None:
    """Train a classifier into runs/NAME, and point runs/latest at it.

    Settings that are not given have the defaults of their kind of model.

    \b
    trainkit train --data sample --model simple
    trainkit train --data data/trec --model prefix --backbone minilm
    """
    from trainkit.console import TrainingBar, evaluation_tables, stderr, stdout
    from trainkit.data.splits import load
    from trainkit.trainer.run import ModelChoice, start

    model_settings = {key: settings.pop(key) for key in ModelChoice.__struct_fields__[1:]}
    choice = ModelChoice(kind=kind, **model_settings)
    config = training_config(kind, settings)
    splits = load(source, columns(labels, text_column, label_column), config.seed, test)
    folder = runs / (name or f"{kind}-{datetime.now():%Y%m%d-%H%M%S}")
    with TrainingBar(config.epochs) as bar:
        run = start(choice, splits, config, folder, bar)
    if as_json:
        print_json({"run": str(folder), "best": run.trained.best, "test": run.test})
    else:
        for table in evaluation_tables(run.test):
            stdout.print(table)
        stdout.print(
            f"Held-out accuracy {100 * run.test.accuracy:.1f} % on {run.test.count} texts; "
            f"best epoch {run.trained.best.epoch}; saved in {folder}",
            highlight=False,
            soft_wrap=True,
        )
    if run.trained.interrupted:
        stderr.print("Interrupted: the best epoch so far was kept.")
        raise SystemExit(130)


def training_config(kind: "Kind", settings: dict[str, Any]) -> "TrainConfig":
    """Return the defaults of this kind of model with what was given on the command line."""
    import msgspec

    from trainkit.trainer.config import DEFAULTS

    given = {key: value for key, value in settings.items() if value is not None}
    return msgspec.structs.replace(DEFAULTS[kind], **given)


@cli.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--data", "data_source", required=True, help="A file, a folder, or 'sample'.")
@click.option(
    "--split",
    type=click.Choice(["train", "valid", "test", "all"]),
    default="test",
    show_default=True,
    help="Of a folder or the sample; a single file is scored whole.",
)
@data_options
@json_option
def evaluate(source: Path, data_source: str, split: "SplitName", as_json: bool, **how: Any) -> None:
    """Score SOURCE, a run or a bundle, on labelled texts.

    \b
    trainkit evaluate runs/latest/onnx --data data/trec
    """
    from trainkit.console import evaluation_tables, stdout, steps
    from trainkit.data.splits import load_split
    from trainkit.export.runtimes import open_classifier
    from trainkit.trainer.metrics import evaluate as score

    with steps() as told:
        examples = load_split(data_source, columns(**how), split)
        told(f"open {source}")
        classifier = open_classifier(source)
        told(f"classify {len(examples)} texts")
        logits = classifier.logits([example.text for example in examples])
    evaluation = score(logits, [example.label for example in examples], classifier.labels)
    if as_json:
        print_json(evaluation)
    else:
        for table in evaluation_tables(evaluation):
            stdout.print(table)


@cli.command()
@click.argument("source", type=click.Path(path_type=Path), default=Path("runs/latest"))
@click.option(
    "--format",
    "formats",
    type=click.Choice(["onnx", "torchscript"]),
    multiple=True,
    default=["onnx"],
    show_default=True,
    help="Give it twice for both.",
)
@click.option("--out", type=click.Path(path_type=Path), help="[default: SOURCE/FORMAT]")
@click.option("--data", "data_source", help="Labelled texts: every label must survive the export.")
@click.option("--split", type=click.Choice(["train", "valid", "test", "all"]), default="test")
@click.option(
    "--force", is_flag=True, help="Replace a bundle that exists, once the new one is good."
)
@data_options
@json_option
def export(
    source: Path,
    formats: tuple["Format", ...],
    out: Path | None,
    data_source: str | None,
    split: "SplitName",
    force: bool,
    as_json: bool,
    **how: Any,
) -> None:
    """Export SOURCE, a run, to a verified bundle. [default: runs/latest]

    \b
    trainkit export --format onnx --format torchscript
    """
    if out is not None and len(formats) > 1:
        raise InputError("--out names one bundle; export one --format at a time with it.")
    from trainkit.console import parity_table, stderr, stdout, steps
    from trainkit.data.splits import load_split
    from trainkit.export import export as exporter
    from trainkit.export.parity import ParityError

    examples = load_split(data_source, columns(**how), split) if data_source else ()
    targets = [(out or source.resolve() / name, name) for name in dict.fromkeys(formats)]
    try:
        with steps() as told:
            exported = exporter.export_all(source, targets, data=examples, force=force, told=told)
    except ParityError as error:
        stderr.print(parity_table(error.report))
        raise
    if as_json:
        print_json([bundle.manifest for bundle in exported])
        return
    for bundle in exported:
        parity = bundle.parity
        stdout.print(
            f"{bundle.folder}: {parity.cases} parity cases, largest difference "
            f"{parity.max_abs:.1e}, labels agree on all {parity.rows} rows",
            highlight=False,
            soft_wrap=True,
        )


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path), help="A run to compare with afresh.")
@json_option
def verify(bundle: Path, against: Path | None, as_json: bool) -> None:
    """Repeat the parity matrix of BUNDLE on this machine.

    Without --against the reference is PyTorch's logits that the bundle keeps: needs no torch.

    \b
    trainkit verify runs/latest/onnx --against runs/latest
    """
    from trainkit.console import parity_table, stdout, steps
    from trainkit.export.parity import ParityError
    from trainkit.export.verify import verify as repeat

    with steps() as told:
        report = repeat(bundle, against, told)
    if as_json:
        print_json(report)
    else:
        stdout.print(parity_table(report))
    if not report.passed:
        raise ParityError(report)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@json_option
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what BUNDLE is, what it came from, and how it was verified.

    \b
    trainkit inspect runs/latest/onnx
    """
    from trainkit.console import manifest_table, stdout
    from trainkit.serve.bundle import open_bundle

    manifest = open_bundle(bundle).manifest
    if as_json:
        print_json(manifest)
    else:
        stdout.print(manifest_table(manifest))


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("texts", nargs=-1)
def predict(bundle: Path, texts: tuple[str, ...]) -> None:
    """Classify TEXTS, or the lines of standard input; one JSON object a line comes out.

    \b
    trainkit predict runs/latest/onnx "How far is Mars?"
    trainkit predict runs/latest/onnx < questions.txt
    """
    import msgspec

    from trainkit.export.runtimes import open_classifier

    classifier = open_classifier(bundle)
    given = iter(texts) if texts else lines(sys.stdin.buffer)
    while chunk := list(itertools.islice(given, PREDICT_CHUNK)):
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


@cli.group()
def bench() -> None:
    """Measure runtimes against each other.

    \b
    trainkit bench run --data questions.csv
    """


@bench.command("run")
@click.argument("sources", nargs=-1, type=click.Path(path_type=Path))
@click.option("--data", "data_source", default="sample", show_default=True)
@click.option(
    "--split",
    type=click.Choice(["train", "valid", "test", "all"]),
    default="test",
    show_default=True,
    help="Of a folder or the sample; a single file is taken whole.",
)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--threads", type=int, help="Of each engine. [default: one a core]")
@click.option("--min-seconds", default=10.0, show_default=True, help="Of each engine.")
@click.option("--min-rounds", default=20, show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Keep the result, samples too, as JSON."
)
@data_options
@json_option
def bench_run(
    sources: tuple[Path, ...],
    data_source: str,
    split: "SplitName",
    batch_size: int,
    threads: int | None,
    min_seconds: float,
    min_rounds: int,
    out: Path | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Time SOURCES, runs and bundles, in turns, each in a process of its own.

    The first is the baseline; the others' outputs must be the same. Without SOURCES: runs/latest in
    PyTorch, and each bundle exported from it.

    \b
    trainkit bench run runs/latest runs/latest/onnx --data data/trec --out bench.json
    """
    from trainkit.bench import race
    from trainkit.bench.result import check, save
    from trainkit.bench.tables import table
    from trainkit.console import stdout, steps
    from trainkit.data.splits import load_split
    from trainkit.serve.bundle import MODEL_FILES

    latest = Path("runs/latest")
    if not sources:
        bundles = (latest / name for name in sorted(MODEL_FILES, reverse=True))
        sources = (latest, *(bundle for bundle in bundles if bundle.is_dir()))
    texts = [example.text for example in load_split(data_source, columns(**how), split)]
    with steps() as told:
        result = race.run(
            sources,
            texts,
            batch_size=batch_size,
            threads=threads,
            min_seconds=min_seconds,
            min_rounds=min_rounds,
            progress=told,
            command=["trainkit", *sys.argv[1:]],
        )
    if out is not None:
        save(result, out)
    if as_json:
        print_json(result)
    else:
        stdout.print(table(result))
    check(result)


def main() -> None:
    """Run the command line."""
    cli()

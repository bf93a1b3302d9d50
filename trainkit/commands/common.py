"""What the commands share: the options of data files, the split to score, JSON output."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import click

if TYPE_CHECKING:
    from trainkit.data.columns import Columns, Labels
    from trainkit.trainer.run_config import DataSpec

__all__ = [
    "A_FILE",
    "SplitName",
    "base_option",
    "columns",
    "data_options",
    "json_option",
    "print_json",
    "setting_options",
    "source_of",
    "split_option",
]

SplitName: TypeAlias = Literal["train", "valid", "test", "all"]
A_FILE = click.Path(path_type=Path, dir_okay=False)
Command = TypeVar("Command", bound=Callable[..., Any])


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


def source_of(
    data: str,
    test: Path | None,
    labels: "Labels",
    text_column: str | None,
    label_column: str | None,
) -> "DataSpec":
    """Gather where the examples are, with absolute paths."""
    from trainkit.trainer.run_config import DataSpec

    return DataSpec(
        data=data if data == "sample" else str(Path(data).resolve()),
        test=None if test is None else str(test.resolve()),
        columns=columns(labels, text_column, label_column),
    )


def rate(value: str) -> float | Literal["auto"]:
    """Read a learning rate, or the word "auto"."""
    if value == "auto":
        return "auto"
    try:
        return float(value)
    except ValueError:
        raise click.BadParameter(f"'{value}' is neither a number nor 'auto'.") from None


# Without defaults: what is not given comes from --config, then from the kind of model.
SETTINGS = (
    click.option(
        "--model",
        type=click.Choice(["simple", "prefix", "finetune"]),
        help="From scratch; a frozen encoder with trained prefixes; or all weights of an encoder.",
    ),
    click.option("--backbone", help="minilm, a Hugging Face folder, or a hub id."),
    click.option("--prefix-length", type=int, help="Trained positions a layer. [default: 16]"),
    click.option(
        "--prefix-projection",
        is_flag=True,
        default=None,
        help="Train the prefix through an MLP, which is folded away.",
    ),
    click.option("--prefix-hidden", type=int, help="Hidden units of that MLP. [default: 512]"),
    click.option(
        "--head",
        type=click.Choice(["mean", "own"]),
        help="Over the mean of the states; or the backbone's own, so that PEFT can load a prefix. "
        "[default: mean]",
    ),
    click.option(
        "--max-length",
        type=int,
        help="Tokens a text is cut to. [default: the encoder's, up to 512]",
    ),
    click.option(
        "--dropout",
        type=float,
        help="0 also drops no words. [default: 0.1 with a backbone, else 0.5]",
    ),
    click.option("--min-count", type=int, help="Rarer words are [UNK]. [default: 2]"),
    click.option("--epochs", type=int),
    click.option("--batch-size", type=int),
    click.option(
        "--learning-rate",
        "--lr",
        "learning_rate",
        type=rate,
        metavar="RATE|auto",
        help="Of the encoder or its prefix; auto: by a range test.",
    ),
    click.option("--head-learning-rate", type=float),
    click.option("--weight-decay", type=float),
    click.option("--warmup-share", type=float, help="Of all steps."),
    click.option("--max-gradient-norm", type=float, help="Larger gradients are scaled to it."),
    click.option("--label-smoothing", type=float),
    click.option(
        "--class-weights",
        type=click.Choice(["none", "balanced"]),
        help="Balanced: rare classes weigh as much as frequent ones. [default: none]",
    ),
    click.option(
        "--focal-gamma", type=float, help="Of the focal loss, usually 2; 0 is cross entropy."
    ),
    click.option(
        "--average-decay", type=float, help="Of the running average of the weights; 0: none."
    ),
    click.option(
        "--patience-epochs",
        type=int,
        help="Stop after so many without a better one: by accuracy, then by loss.",
    ),
    click.option(
        "--refit",
        is_flag=True,
        default=None,
        help="Then train anew on train and validation together: that model is kept.",
    ),
    click.option(
        "--batch-tokens",
        type=int,
        help="Computed at once, padding counted; larger batches in parts. [default: 4096]",
    ),
    click.option(
        "--precision",
        type=click.Choice(["fp32", "bf16"]),
        help="bf16: autocast, for GPUs and CPUs that have it. [default: fp32]",
    ),
    click.option(
        "--compile",
        is_flag=True,
        default=None,
        help="With torch.compile, which needs a C++ compiler (on a GPU: Triton).",
    ),
    click.option("--seed", type=int, help="One seed makes a run repeatable."),
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"])),
    click.option(
        "--config",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Settings from a TOML file; options win over it.",
    ),
)


def setting_options(command: Command) -> Command:
    """Add an option for every setting of a training, and ``--config``."""
    for option in reversed(SETTINGS):
        command = option(command)
    return command


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document instead of tables."
)


base_option = click.option("--base", help="The model that a PEFT adapter belongs to, if it moved.")


split_option = click.option(
    "--split",
    type=click.Choice(["train", "valid", "test", "all"]),
    help="What is taken of --data. [default: test; of a single file all]",
)


def print_json(document: Any) -> None:
    """Print one document on standard output."""
    from trainkit.serve.files import pretty_json

    sys.stdout.buffer.write(pretty_json(document))
    sys.stdout.flush()

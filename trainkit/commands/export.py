"""``trainkit export``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trainkit.commands.common import (
    SplitName,
    base_option,
    columns,
    data_options,
    json_option,
    print_json,
    split_option,
)
from trainkit.serve.errors import InputError

if TYPE_CHECKING:
    from trainkit.export.bundle_writer import ExportFormat, ExportResult
    from trainkit.serve.bundle import Precision

__all__ = ["export"]


FORMATS = ["onnx", "torchscript", "pt2", "aoti", "triton"]


@click.command()
@click.argument("source", default="runs/latest")
@click.option(
    "--format",
    "formats",
    type=click.Choice(FORMATS),
    multiple=True,
    default=["onnx"],
    show_default=True,
    help="Give it twice for two. pt2 is torch.export's program, aoti machine code of this kind of "
    "machine, triton a model repository with the ONNX model.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8"]),
    default="fp32",
    show_default=True,
    help="Below fp32 for ONNX; int8 needs --data.",
)
@click.option(
    "--max-accuracy-drop",
    type=float,
    default=0.5,
    show_default=True,
    help="Percentage points that a precision may cost on --data; over it the export fails.",
)
@click.option(
    "--min-label-agreement",
    type=float,
    default=97.0,
    show_default=True,
    help="Percent of --data that must keep its label in a precision below fp32.",
)
@click.option("--opset", type=int, default=23, show_default=True, help="ONNX opset, 18 to 23.")
@click.option("--no-optimize", is_flag=True, help="Leave the ONNX graph as PyTorch exported it.")
@click.option(
    "--external-data",
    is_flag=True,
    help="Write the ONNX weights to model.onnx.data, which processes map and share.",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=1),
    help="Where a text is cut, in tokens, for a Hugging Face model. [default: its own, up to 512]",
)
@base_option
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run Python code that lies beside the model. Read it first.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="[default: SOURCE/FORMAT of a run, else exports/NAME/FORMAT]",
)
@click.option("--data", "data_source", help="Labelled texts: every label must survive the export.")
@split_option
@click.option(
    "--force", is_flag=True, help="Replace a bundle that exists, once the new one is good."
)
@data_options
@json_option
def export(
    source: str,
    formats: tuple["ExportFormat", ...],
    precision: "Precision",
    max_accuracy_drop: float,
    min_label_agreement: float,
    opset: int,
    no_optimize: bool,
    external_data: bool,
    max_length: int | None,
    base: str | None,
    trust_remote_code: bool,
    out: Path | None,
    data_source: str | None,
    split: SplitName | None,
    force: bool,
    as_json: bool,
    **how: Any,
) -> None:
    """Export SOURCE to a verified bundle. [default: runs/latest]

    SOURCE is a run, the folder or hub id of a Hugging Face sequence classifier, or the folder of a
    PEFT adapter.

    \b
    trainkit export --format onnx --format torchscript
    trainkit export cross-encoder/ms-marco-MiniLM-L6-v2
    trainkit export my-lora --base bert-base-uncased --precision int8 --data dev.csv
    """
    if out is not None and len(formats) > 1:
        raise InputError("--out names one bundle; export one --format at a time with it.")
    if precision == "int8" and data_source is None:
        raise InputError(
            "--precision int8 needs labelled texts to judge what it costs; give --data FILE."
        )
    from trainkit.models.sources import is_kind

    for option, given in (("--max-length", max_length), ("--base", base)):
        if given is not None and is_kind(source, "run"):
            raise InputError(f"{source} is a run, which has its own {option}; leave it out.")
    from trainkit.console import parity_table, stage_table, stderr, stdout, steps
    from trainkit.data.splits import load_split
    from trainkit.export import bundle_writer
    from trainkit.export.parity import ParityError
    from trainkit.export.runtimes import training_seed
    from trainkit.export.settings import ExportSettings
    from trainkit.export.source import open_source

    settings = ExportSettings(
        precision=precision,
        opset=opset,
        optimize=not no_optimize,
        external_data=external_data,
        max_accuracy_drop=max_accuracy_drop,
        min_label_agreement=min_label_agreement,
    )
    targets = [
        bundle_writer.make_target(source, name, settings, out) for name in dict.fromkeys(formats)
    ]
    seed = training_seed(Path(source))
    examples = load_split(data_source, columns(**how), split, seed) if data_source else ()
    try:
        with steps() as told:
            told(f"load {source}")
            opened = open_source(
                source, base=base, max_length=max_length, trust_remote_code=trust_remote_code
            )
            exported = bundle_writer.export_all(
                opened, targets, data=examples, force=force, on_progress=told
            )
    except ParityError as error:
        stderr.print(parity_table(error.report))
        raise
    if as_json:
        print_json([made.manifest for made in exported])
        return
    for made in exported:
        stdout.print(stage_table(made.manifest))
        for note in made.manifest.notes:
            stdout.print(f"note: {note}", highlight=False, soft_wrap=True)
        stdout.print(_summary(made), highlight=False, soft_wrap=True)


def _summary(made: "ExportResult") -> str:
    parity = made.parity
    said = (
        f"{made.folder}: {parity.cases} parity cases, largest difference {parity.max_abs:.1e}, "
        f"labels agree on {100 * parity.label_agreement:.2f} % of {parity.rows} rows"
    )
    if made.accuracy is not None and made.accuracy.accuracy is not None:
        said += f"; accuracy {100 * made.accuracy.accuracy:.1f} % on your data"
        said += f" ({-made.accuracy.drop_points:+.2f} points)"
    return said

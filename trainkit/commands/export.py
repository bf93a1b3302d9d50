"""``trainkit export``."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trainkit.commands.common import (
    A_PATH,
    base_option,
    column_options,
    data_option,
    json_option,
    print_json,
    print_line,
    split_option,
)
from trainkit.commands.options import command, option, options_of
from trainkit.export.settings import ExportSettings
from trainkit.serve.errors import InputError
from trainkit.serve.formats import MODEL_FILES

if TYPE_CHECKING:
    from trainkit.export.bundle_writer import ExportFormat, ExportResult

MODEL = "Model"


@command()
@click.argument("source", default="runs/latest")
@option(
    "--format",
    "formats",
    type=click.Choice([*MODEL_FILES, "triton"]),
    multiple=True,
    default=["onnx"],
    help="Format to export to; may be repeated. pt2 is a torch.export program, aoti machine code "
    "for this kind of processor, triton a model repository with the ONNX model.",
    group="Output",
)
@option(
    "--out",
    type=A_PATH,
    help="Folder of the bundle.  [default: SOURCE/FORMAT of a run, else exports/NAME/FORMAT]",
    group="Output",
)
@option(
    "--force",
    is_flag=True,
    help="Replace a bundle that exists, once the new one has passed its checks.",
    group="Output",
)
@options_of(ExportSettings, without=["format"], group="Conversion")
@data_option(None)
@split_option
@column_options
@option(
    "--max-length",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Length in tokens to which texts are truncated, for a Hugging Face model.  "
    "[default: its own, up to 512]",
    group=MODEL,
)
@base_option
@option(
    "--trust-remote-code",
    is_flag=True,
    help="Run Python code that lies beside the model. Read it first.",
    group=MODEL,
)
@json_option
def export(
    source: str,
    formats: tuple["ExportFormat", ...],
    out: Path | None,
    force: bool,
    data: str | None,
    split: Any,
    text_column: str | None,
    label_column: str | None,
    trec_labels: Any,
    max_length: int | None,
    base: str | None,
    trust_remote_code: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Export SOURCE to a verified bundle. [default: runs/latest]

    SOURCE is a run, the folder or hub id of a Hugging Face sequence classifier, or the folder of a
    PEFT adapter.

    \b
    trainkit export --format onnx --format torchscript
    trainkit export cross-encoder/ms-marco-MiniLM-L6-v2
    trainkit export my-lora --base bert-base-uncased --precision int8 --data dev.csv
    """
    _check(out, formats, settings["precision"], data)
    from trainkit.api.inputs import examples_of
    from trainkit.api.models import TrainedModel
    from trainkit.console import parity_table, stderr
    from trainkit.data.columns import Columns
    from trainkit.export.parity import ParityError
    from trainkit.models.sources import is_kind

    for name, given in (("--max-length", max_length), ("--base", base)):
        if given is not None and is_kind(source, "run"):
            raise InputError(f"{source} is a run, which has its own {name}; leave it out.")
    model = TrainedModel(
        source, base=base, max_length=max_length, trust_remote_code=trust_remote_code
    )
    columns = Columns(trec_labels, text_column, label_column)
    try:
        exported = model.export_all(
            list(dict.fromkeys(formats)),
            ExportSettings(**settings),
            out=out,
            examples=examples_of(data, None, columns, split, source),
            force=force,
        )
    except ParityError as error:
        stderr.print(parity_table(error.report))
        raise
    if as_json:
        print_json([made.manifest for made in exported])
    else:
        for made in exported:
            _report(made)


def _check(out: Path | None, formats: Sequence[str], precision: str, data: str | None) -> None:
    if out is not None and len(formats) > 1:
        raise InputError("--out names one bundle; export one --format at a time with it.")
    if precision == "int8" and data is None:
        raise InputError(
            "--precision int8 needs labelled texts to judge what it costs; give --data FILE."
        )


def _report(made: "ExportResult") -> None:
    from trainkit.console import stage_table, stdout

    stdout.print(stage_table(made.manifest))
    for note in made.manifest.notes:
        print_line(f"note: {note}")
    parity = made.parity
    summary = (
        f"{made.folder}: {parity.cases} parity cases, largest difference {parity.max_abs:.1e}, "
        f"labels agree on {100 * parity.label_agreement:.2f}% of {parity.rows} rows"
    )
    if made.accuracy is not None and made.accuracy.accuracy is not None:
        summary += f"; accuracy {100 * made.accuracy.accuracy:.1f}% on your data"
        summary += f" ({-made.accuracy.drop_points:+.2f} points)"
    print_line(summary)

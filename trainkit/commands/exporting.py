"""``trainkit export``, ``verify`` and ``inspect``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trainkit.commands.common import (
    SplitName,
    columns,
    data_options,
    json_option,
    print_json,
    split_option,
)
from trainkit.serve.errors import InputError

if TYPE_CHECKING:
    from trainkit.serve.bundle import Format

__all__ = ["export", "inspect", "verify"]


@click.command()
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
@split_option
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
    split: SplitName,
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


@click.command()
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


@click.command()
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

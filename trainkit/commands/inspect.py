"""``trainkit inspect``."""

from pathlib import Path

import click

from trainkit.commands.common import json_option, print_json

__all__ = ["inspect"]


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

"""``trainkit inspect``."""

from pathlib import Path

import click

from trainkit.commands.common import A_PATH, json_option, print_json
from trainkit.commands.options import command


@command()
@click.argument("bundle", type=A_PATH)
@json_option
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what BUNDLE is, what it came from, and how it was verified.

    \b
    trainkit inspect runs/latest/onnx
    """
    from trainkit import Bundle
    from trainkit.console import manifest_table, stdout

    manifest = Bundle(bundle).manifest
    if as_json:
        print_json(manifest)
    else:
        stdout.print(manifest_table(manifest))

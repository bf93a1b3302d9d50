"""``trainkit verify``."""

from pathlib import Path

import click

from trainkit.commands.common import base_option, json_option, print_json

__all__ = ["verify"]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--against", help="A run, a model or an adapter to compare with afresh.")
@base_option
@json_option
def verify(bundle: Path, against: str | None, base: str | None, as_json: bool) -> None:
    """Repeat the parity matrix of BUNDLE on this machine.

    Without --against the reference is PyTorch's logits that the bundle keeps: needs no torch.

    \b
    trainkit verify runs/latest/onnx --against runs/latest
    """
    from trainkit.console import parity_table, stdout, steps
    from trainkit.export.parity import ParityError
    from trainkit.export.verify import verify as repeat

    with steps() as told:
        report = repeat(bundle, against, base, told)
    if as_json:
        print_json(report)
    else:
        stdout.print(parity_table(report))
    if not report.passed:
        raise ParityError(report)

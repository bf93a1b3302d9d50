"""``trainkit verify``."""

from pathlib import Path

import click

from trainkit.commands.common import A_PATH, base_option, json_option, print_json
from trainkit.commands.options import command, option


@command()
@click.argument("bundle", type=A_PATH)
@option(
    "--against",
    metavar="MODEL",
    help="Run, model or adapter whose outputs are computed again as the reference.",
)
@base_option
@json_option
def verify(bundle: Path, against: str | None, base: str | None, as_json: bool) -> None:
    """Repeat the parity matrix of BUNDLE on this machine.

    Without --against the reference is PyTorch's logits that the bundle keeps, which needs no torch.

    \b
    trainkit verify runs/latest/onnx --against runs/latest
    """
    from trainkit import verify as repeat
    from trainkit.console import parity_table, stdout
    from trainkit.export.parity import ParityError

    report = repeat(bundle, against, base=base)
    if as_json:
        print_json(report)
    else:
        stdout.print(parity_table(report))
    if not report.passed:
        raise ParityError(report)

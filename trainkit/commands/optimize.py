"""``trainkit optimize``."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from trainkit.commands.common import A_PATH, json_option, print_json, print_line
from trainkit.commands.options import command, option

if TYPE_CHECKING:
    from rich.table import Table

    from trainkit.export.optimize import Optimized


@command()
@click.argument("model", type=A_PATH)
@option("--out", type=A_PATH, help="ONNX file to write.  [default: MODEL.optimized.onnx]")
@option(
    "--force",
    is_flag=True,
    help="Replace a file that exists, once the new one has passed its checks.",
)
@json_option
def optimize(model: Path, out: Path | None, force: bool, as_json: bool) -> None:
    """Make MODEL, the ONNX file of a text classifier, faster on CPUs.

    MODEL may come from any exporter. Every rewrite is compared with MODEL in ONNX Runtime, on 60
    batches with all kinds of padding. If one changes an answer, nothing is written.

    \b
    trainkit optimize model.onnx --out faster.onnx
    """
    from trainkit.console import stdout, steps
    from trainkit.export.optimize import optimize as run

    with steps() as told:
        optimized = run(
            model, out or model.with_suffix(".optimized.onnx"), force=force, on_progress=told
        )
    if as_json:
        print_json(optimized)
        return
    stdout.print(_table(optimized))
    skipped = len(optimized.skipped)
    print_line(
        f"{optimized.target}: {optimized.nodes_after} nodes instead of {optimized.nodes_before}, "
        f"the same answers on {optimized.cases} batches"
        + (f"; {skipped} that MODEL itself cannot answer" if skipped else "")
    )


def _table(optimized: "Optimized") -> "Table":
    from rich.table import Table

    table = Table()
    for column in ("rewrite", "places", "largest difference", "left as it was, because"):
        table.add_column(column, justify="right" if column == "places" else "left")
    for step in optimized.steps:
        table.add_row(
            step.name,
            str(step.rewritten),
            "-" if step.max_abs is None else f"{step.max_abs:.1e}",
            "; ".join(step.declined),
        )
    return table

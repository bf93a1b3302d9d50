"""``trainkit optimize``."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from trainkit.commands.common import json_option, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from trainkit.export.optimize import Optimized

__all__ = ["optimize"]


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="[default: MODEL.optimized.onnx]")
@click.option("--force", is_flag=True, help="Replace a file that exists, once the new one is good.")
@json_option
def optimize(model: Path, out: Path | None, force: bool, as_json: bool) -> None:
    """Make MODEL, the ONNX file of a text classifier, faster on CPUs.

    Whoever exported it: every rewrite is proven against MODEL in ONNX Runtime, on 60 batches of all
    kinds of padding. One that changes an answer is refused, and nothing is written.

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
    stdout.print(
        f"{optimized.target}: {optimized.nodes_after} nodes instead of {optimized.nodes_before}, "
        f"the same answers on {optimized.cases} batches"
        + (f"; {len(optimized.skipped)} that MODEL itself cannot answer" * bool(optimized.skipped)),
        highlight=False,
        soft_wrap=True,
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

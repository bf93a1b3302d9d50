"""``trainkit evaluate``."""

from pathlib import Path
from typing import Any

import click

from trainkit.commands.common import (
    A_PATH,
    base_option,
    column_options,
    data_option,
    json_option,
    print_json,
    split_option,
)
from trainkit.commands.options import command


@command()
@click.argument("source", type=A_PATH)
@data_option(None, required=True)
@split_option
@column_options
@base_option
@json_option
def evaluate(source: Path, data: str, as_json: bool, **options: Any) -> None:
    """Score SOURCE, a run, a bundle or a PEFT adapter, on labelled texts.

    If --data has no test split, one is made with the seed of SOURCE's training, so that on the
    training data it holds the same test texts.

    \b
    trainkit evaluate runs/latest/onnx --data data/trec
    """
    from trainkit import evaluate as score
    from trainkit.console import evaluation_tables, stdout

    evaluation = score(source, data, **options)
    if as_json:
        print_json(evaluation)
    else:
        for table in evaluation_tables(evaluation):
            stdout.print(table)

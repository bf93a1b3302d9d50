"""``trainkit evaluate``."""

from pathlib import Path
from typing import Any

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

__all__ = ["evaluate"]


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--data", "data_source", required=True, help="A file, a folder, or 'sample'.")
@split_option
@base_option
@data_options
@json_option
def evaluate(
    source: Path,
    data_source: str,
    split: SplitName | None,
    base: str | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Score SOURCE, a run, a bundle or a PEFT adapter, on labelled texts.

    A split that --data does not have is made with the seed of SOURCE's training: of the data that
    it was trained on, its own test texts.

    \b
    trainkit evaluate runs/latest/onnx --data data/trec
    """
    from trainkit.console import evaluation_tables, stdout, steps
    from trainkit.data.splits import load_split
    from trainkit.export.runtimes import open_classifier, training_seed
    from trainkit.trainer.metrics import evaluate as score
    from trainkit.trainer.run_folder import check_own_test

    check_own_test(source, data_source, split)
    with steps() as told:
        examples = load_split(data_source, columns(**how), split, training_seed(source))
        told(f"open {source}")
        classifier = open_classifier(source, base)
        if classifier.problem_type != "single_label_classification":
            raise InputError(
                f"{source} does {classifier.problem_type}, and evaluate scores one label a text; "
                "compare its outputs with trainkit verify."
            )
        told(f"classify {len(examples)} texts")
        logits = classifier.logits([example.text for example in examples])
    labels = [example.label for example in examples]
    evaluation = score(logits, labels, classifier.labels, classifier.temperature)
    if as_json:
        print_json(evaluation)
    else:
        for table in evaluation_tables(evaluation):
            stdout.print(table)

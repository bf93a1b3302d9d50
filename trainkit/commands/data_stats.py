"""``trainkit data stats``."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trainkit.commands.common import A_PATH, column_options, json_option, print_json
from trainkit.commands.options import command, option

if TYPE_CHECKING:
    from trainkit.data.readers import Example


@command("stats")
@click.argument("source")
@option("--test", type=A_PATH, metavar="FILE", help="File that is the test set.", group="Data")
@column_options
@option(
    "--seed",
    type=int,
    default=0,
    help="Seed of the split, if one is made.",
    group="Data",
)
@option(
    "--tokenizer",
    metavar="MODEL",
    help="Backbone whose tokenizer counts tokens: minilm, a folder or a hub id.  [default: the "
    "vocabulary of words]",
)
@json_option
def data_stats(
    source: str,
    test: Path | None,
    seed: int,
    tokenizer: str | None,
    text_column: str | None,
    label_column: str | None,
    trec_labels: Any,
    as_json: bool,
) -> None:
    """Count classes, lengths, duplicates and leaks of SOURCE: a file, a folder, or 'sample'.

    \b
    trainkit data stats questions.csv --text-column question --label-column topic
    """
    from trainkit.console import stdout
    from trainkit.data.columns import Columns
    from trainkit.data.splits import load
    from trainkit.data.statistics import describe, print_statistics

    splits = load(source, Columns(trec_labels, text_column, label_column), seed, test)
    statistics = describe(splits, token_counter(tokenizer, splits.train))
    if as_json:
        print_json(statistics)
    else:
        print_statistics(statistics, stdout)


def token_counter(
    name: str | None, train: "Sequence[Example]"
) -> Callable[[Sequence[str]], list[int]]:
    """Return a function that counts tokens: a backbone's, or those of the word vocabulary."""
    if name is not None:
        from trainkit.models.backbone import pretrained_tokenizer

        tokenizer = pretrained_tokenizer(name)
    else:
        from trainkit.data.vocabulary import word_tokenizer

        tokenizer = word_tokenizer([example.text for example in train])
    return lambda texts: [len(encoding) for encoding in tokenizer.encode_batch(list(texts))]

"""``trainkit data stats``."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trainkit.commands.common import columns, data_options, json_option, print_json

if TYPE_CHECKING:
    from trainkit.data.readers import Example

__all__ = ["data_stats"]


@click.command("stats")
@click.argument("source")
@click.option("--test", type=click.Path(path_type=Path), help="A file that is the test set.")
@click.option("--seed", default=0, show_default=True, help="Of the split, where one is made.")
@click.option(
    "--tokenizer", help="Count tokens with a backbone's tokenizer: minilm, a folder or hub id."
)
@data_options
@json_option
def data_stats(
    source: str, test: Path | None, seed: int, tokenizer: str | None, as_json: bool, **how: Any
) -> None:
    """Count classes, lengths, duplicates and leaks of SOURCE: a file, a folder, or 'sample'.

    \b
    trainkit data stats questions.csv --text-column question --label-column topic
    """
    from trainkit.console import stdout
    from trainkit.data.splits import load
    from trainkit.data.statistics import describe, print_statistics

    splits = load(source, columns(**how), seed, test)
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

"""What the functions of the API share: labelled texts of any kind, and progress."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from trainkit.data.columns import Columns
from trainkit.serve.errors import InputError

if TYPE_CHECKING:
    from trainkit.data.readers import Example

Folder: TypeAlias = str | os.PathLike[str]
Split: TypeAlias = Literal["train", "valid", "test", "all"]


def examples_of(
    data: Any,
    labels: Sequence[str | int] | None,
    columns: Columns,
    split: Split | None,
    source: Folder | None = None,
) -> "Sequence[Example]":
    """Return the labelled texts to score ``source`` on; none if ``data`` is None.

    ``split`` is taken of a file, a folder or a mapping of splits; the default is the test set, and
    of a single file or table all. A split that is not given is made with the seed of the training
    of ``source``, so that it holds none of its training texts.
    """
    if data is None:
        return ()
    if isinstance(data, str | os.PathLike):
        if labels is not None:
            raise InputError(f"labels go with a list of texts, and {str(data)!r} is a path.")
        from trainkit.data.splits import load_split
        from trainkit.export.runtimes import training_seed

        seed = 0 if source is None else training_seed(Path(source))
        return load_split(os.fspath(data), columns, split, seed)
    from trainkit.data.in_memory import examples_from
    from trainkit.data.splits import STEMS

    if isinstance(data, Mapping):
        name = split or "test"
        found = [table for key, table in data.items() if STEMS.get(str(key).casefold()) == name]
        if len(found) != 1:
            raise InputError(
                f"the data has {'no' if not found else 'more than one'} split {name!r}: "
                f"{', '.join(map(str, data))}."
            )
        (data,) = found
    elif split is not None:
        raise InputError("a split can be taken of a path or a mapping of splits; leave it out.")
    return examples_from(data, labels, columns=columns, name=split or "given")


@contextmanager
def progress(on_progress: Callable[[str], None] | None) -> Iterator[Callable[[str], None]]:
    """Yield the caller's callback, else one that shows a line if standard error is a terminal."""
    if on_progress is not None or not sys.stderr.isatty():
        yield on_progress or (lambda step: None)
        return
    from trainkit.console import steps

    with steps() as report:
        yield report


def note(sentence: str) -> None:
    """Print a sentence on standard error."""
    from trainkit.console import stderr

    stderr.print(sentence, highlight=False, soft_wrap=True)

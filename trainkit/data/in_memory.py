"""Labelled texts that are already in memory: lists, a pandas DataFrame or a Hugging Face dataset.

pandas and datasets are never imported: their objects are recognised by their attributes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainkit.data.columns import Columns, find_columns
from trainkit.data.readers import Example, example_of, first_few
from trainkit.data.splits import STEMS, Splits, complete, load
from trainkit.serve.errors import InputError


def splits_from(
    data: Any,
    labels: Sequence[str | int] | None = None,
    *,
    columns: Columns | None = None,
    test: Any = None,
    seed: int = 0,
) -> Splits:
    """Return train, validation and test of data of any kind.

    ``data`` is a path or "sample" (see :func:`trainkit.data.splits.load`), a list of texts with
    their ``labels``, a pandas ``DataFrame``, a ``datasets.Dataset``, or a ``datasets.DatasetDict``
    (or other mapping) from split names to such tables. ``columns`` names the columns of a table.
    ``test`` is of the same kind and kept whole as the test set; for lists, a pair ``(texts,
    labels)``. Each split that is not given is a tenth of train, taken out of it by ``seed``.

    Raises ``InputError`` if lengths differ, texts are empty, or columns are missing, and as
    :func:`trainkit.data.splits.load` does.
    """
    columns = columns or Columns()
    if test is not None and isinstance(data, str | Path) != isinstance(test, str | Path):
        raise InputError("data and test must be of one kind: give two paths, or neither.")
    if isinstance(data, str | Path):
        if labels is not None:
            raise InputError(f"labels go with a list of texts, and {str(data)!r} is a path.")
        return load(data, columns, seed, None if test is None else Path(test))
    if isinstance(data, Mapping):
        rows = _rows_by_split(data, columns)
    else:
        rows = {"train": examples_from(data, labels, columns=columns)}
    if test is not None:
        if "test" in rows:
            raise InputError("the data has a test split already; leave test out.")
        pair = test if isinstance(test, tuple) and len(test) == 2 else (test, None)
        rows["test"] = examples_from(*pair, columns=columns, name="test")
    return complete(rows, {split: f"the {split} data" for split in rows}, seed)


def examples_from(
    data: Any,
    labels: Sequence[str | int] | None = None,
    *,
    columns: Columns | None = None,
    name: str = "train",
) -> list[Example]:
    """Return the examples of a list of texts with its ``labels``, or of a table.

    ``name`` is used in the message of the ``InputError`` raised for faulty rows.
    """
    text_key, label_key = "text", "label"
    if (names := _column_names(data)) is not None:
        if labels is not None:
            raise InputError("labels go with a list of texts; a table has them in a column.")
        text, label = find_columns(f"the {name} data", [*map(str, names)], columns or Columns())
        text_key, label_key = str(names[text]), str(names[label])
        texts, labels = list(data[names[text]]), _labels(data, names[label])
    elif isinstance(data, str | bytes) or not hasattr(data, "__iter__"):
        raise InputError(
            f"the {name} data is a {type(data).__name__}; expected a list of texts with labels, a "
            "pandas DataFrame, a datasets.Dataset, or the path of a file."
        )
    elif labels is None:
        raise InputError(f"the {name} data is a list of texts without labels; give both.")
    else:
        texts, labels = list(data), list(labels)
    if len(texts) != len(labels):
        raise InputError(
            f"the {name} data has {len(texts)} texts and {len(labels)} labels; give one label per "
            "text."
        )
    if not texts:
        raise InputError(f"the {name} data is empty; give labelled texts.")
    rows = [example_of(*row, text_key, label_key) for row in zip(texts, labels, strict=True)]
    faults = [f"row {i}: {row}" for i, row in enumerate(rows) if isinstance(row, str)]
    if faults:
        raise InputError(
            f"the {name} data has {len(faults)} faulty row{'s' * (len(faults) > 1)} to correct or "
            f"remove (rows are counted from 0): {first_few(faults, '; ')}."
        )
    return [row for row in rows if isinstance(row, Example)]


def _column_names(data: Any) -> list[Any] | None:
    """Return the columns of a datasets.Dataset or pandas DataFrame; None for anything else.

    Those of a DataFrame need not be strings.
    """
    names = getattr(data, "column_names", None)
    if names is None:
        names = getattr(data, "columns", None)
    return None if names is None else list(names)


def _labels(data: Any, key: Any) -> list[Any]:
    """Return the labels of a table, by their names if the dataset has a ClassLabel feature.

    -1 or None, which stand for no label there, become None.
    """
    labels = list(data[key])
    features = getattr(data, "features", None)  # of a DataFrame, perhaps a column
    name_of = getattr(features.get(key), "int2str", None) if isinstance(features, dict) else None
    if name_of is None:
        return labels
    return [None if label is None or label < 0 else name_of(label) for label in labels]


def _rows_by_split(data: Mapping[str, Any], columns: Columns) -> dict[str, list[Example]]:
    rows: dict[str, list[Example]] = {}
    for name, table in data.items():
        split = STEMS.get(str(name).casefold())
        if split is None:
            continue
        if split in rows:
            raise InputError(f"the data has two splits for {split}; leave one of them out.")
        rows[split] = examples_from(table, columns=columns, name=split)
    if "train" not in rows:
        raise InputError(f"the data has no split 'train', only {', '.join(map(str, data))}.")
    return rows

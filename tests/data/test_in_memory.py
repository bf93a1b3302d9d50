"""Lists, pandas DataFrames and Hugging Face datasets give the splits that a file would."""

import subprocess
import sys

import numpy as np
import pytest

from trainkit.data.columns import Columns
from trainkit.data.in_memory import examples_from, splits_from
from trainkit.data.splits import load, load_sample
from trainkit.serve.errors import InputError

TEXTS = [example.text for example in load_sample()]
LABELS = [example.label for example in load_sample()]


class Frame:
    """What is used of a pandas DataFrame."""

    def __init__(self, **columns):
        self.data, self.columns = columns, list(columns)

    def __getitem__(self, name):
        return self.data[name]


class ClassLabel:
    def int2str(self, number):
        return "ab"[number]


class Dataset:
    """What is used of a datasets.Dataset."""

    def __init__(self, **columns):
        self.data, self.column_names = columns, list(columns)
        self.features = {"label": ClassLabel()}

    def __getitem__(self, name):
        return self.data[name]


def test_lists_and_tables_give_the_splits_of_a_file():
    expected = load("sample", Columns(), 3)
    assert splits_from(TEXTS, LABELS, seed=3) == expected
    assert splits_from(np.array(TEXTS), np.array(LABELS), seed=3) == expected
    assert splits_from(Frame(id=[0] * 750, text=TEXTS, label=LABELS), seed=3) == expected
    assert splits_from("sample", seed=3) == expected


def test_pandas_and_datasets_themselves():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"question": TEXTS, "category": LABELS})
    assert splits_from(frame) == load("sample", Columns())
    codes = pandas.DataFrame({"text": ["a", "b"], "label": [1, 0]})
    assert [example.label for example in examples_from(codes)] == ["1", "0"]


def test_class_labels_of_a_dataset_get_their_names():
    data = Dataset(text=["one", "two", "three"], label=[0, 1, 1])
    assert [example.label for example in examples_from(data)] == ["a", "b", "b"]


def test_a_row_without_a_class_label_is_a_fault():
    data = Dataset(text=["one", "two"], label=[0, -1])  # as the test sets of GLUE
    with pytest.raises(InputError, match="row 1: neither a string nor an integer under 'label'"):
        examples_from(data)


def test_columns_of_a_frame_may_have_any_name():
    frame = Frame(text=["a"], label=["x"], features=[1])
    frame.features = np.zeros(2)  # pandas has columns as attributes; a Series has no truth value
    assert [example.label for example in examples_from(frame)] == ["x"]
    numbered = Frame()
    numbered.data, numbered.columns = {0: ["a"], 1: ["x"]}, [0, 1]
    columns = Columns(text_column="0", label_column="1")
    assert [example.text for example in examples_from(numbered, columns=columns)] == ["a"]


@pytest.mark.parametrize(
    ("data", "test"), [("sample", Frame(text=["a"], label=["x"])), (["a", "b"], "test.csv")]
)
def test_a_path_and_texts_in_memory_do_not_mix(data, test):
    with pytest.raises(InputError, match="data and test must be of one kind"):
        splits_from(data, test=test)


def test_splits_that_are_given_are_kept():
    part = Frame(text=TEXTS, label=LABELS)
    other = Frame(text=["Who ?"], label=[LABELS[0]])
    splits = splits_from({"train": part, "validation": other, "test": other, "extra": other})
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (len(TEXTS), 1, 1)
    splits = splits_from(TEXTS, LABELS, test=(["Who ?"], [LABELS[0]]))
    assert [example.text for example in splits.test] == ["Who ?"]


@pytest.mark.parametrize(
    ("data", "labels", "message"),
    [
        (["a", "b"], ["x"], "2 texts and 1 labels"),
        ([], [], "is empty"),
        (["a", " ", ""], ["x", "y", "x"], "2 faulty rows .* row 1: empty text; row 2"),
        (["a", None], ["x", "y"], "row 1: no string under 'text'"),
        (["a", "b"], ["x", float("nan")], "row 1: neither a string nor an integer"),
        (["a", "b"], None, "without labels"),
        (7, None, "is a int; expected"),
        (Frame(text=["a"], score=[1]), None, "one of label, category"),
        (Frame(text=["a"], label=[1]), ["x"], "has them in a column"),
        ({"test": Frame(text=["a"], label=[1])}, None, "no split 'train', only test"),
        ("some.csv", ["x"], "is a path"),
        (["a", "b"], ["x", "x"], "one class only"),
    ],
)
def test_bad_data_is_named(data, labels, message):
    with pytest.raises(InputError, match=message):
        splits_from(data, labels)


def test_pandas_and_datasets_are_not_imported():
    code = (
        "import sys; from trainkit.data.in_memory import splits_from;"
        "splits_from(['a b', 'c d', 'e', 'f', 'g', 'h'], [0, 1] * 3);"
        "assert not {'pandas', 'datasets', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

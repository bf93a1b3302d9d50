"""The Python API: what it computes, that it is light to import, and that it cannot drift."""

import inspect
import subprocess
import sys
import time
import typing

import msgspec
import pytest

import trainkit
from trainkit.api.inputs import examples_of
from trainkit.api.option_types import ExportOptions, TrainOptions
from trainkit.cli import cli
from trainkit.data.columns import Columns
from trainkit.data.readers import Example
from trainkit.data.splits import load_sample
from trainkit.export.settings import ExportSettings
from trainkit.models.sources import CHECKPOINT
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.run_config import ModelSpec

TEXTS = [example.text for example in load_sample()[:150]]
LABELS = [example.label for example in load_sample()[:150]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    runs = tmp_path_factory.mktemp("api") / "runs"
    return trainkit.train(TEXTS, LABELS, model="simple", epochs=1, runs=runs, name="first")


@pytest.fixture(scope="module")
def bundle(run):
    return run.export("onnx")


def test_lists_become_an_exported_classifier(run, bundle):
    prediction = bundle.classifier()("How far is Mars?")
    assert prediction.label in set(LABELS)
    assert (run.folder / "onnx").samefile(bundle.folder)
    assert bundle.verify().passed
    assert trainkit.verify(bundle.folder, run).passed
    assert run.test.count > 0


def test_every_kind_of_source_and_data_is_scored_alike(run, bundle):
    first = run.evaluate(TEXTS, LABELS)
    assert first.count == 150
    for source in (bundle, run.folder, str(bundle.folder)):
        assert trainkit.evaluate(source, TEXTS, LABELS).confusion == first.confusion
    table = {"test": trainkit_table()}
    assert trainkit.evaluate(bundle, table).confusion == first.confusion


def trainkit_table():
    """Return what has the columns of a table, as a datasets.Dataset has."""

    class Table(dict):
        column_names = ("text", "label")

    return Table(text=TEXTS, label=LABELS)


def test_an_opened_model_exports_what_it_computes(run, tmp_path):
    model = trainkit.open_model(run.folder)
    made = model.export("torchscript", out=tmp_path / "out")
    assert made.manifest.format == "torchscript"
    expected = model.classifier()(TEXTS[:9])
    assert [p.label for p in made.classifier()(TEXTS[:9])] == [p.label for p in expected]
    with pytest.raises(trainkit.InputError, match="threads cannot be given"):
        made.classifier(threads=1)


def test_a_benchmark_is_drawn_and_recommends(run, bundle, tmp_path):
    result = trainkit.benchmark(
        [run, bundle], (TEXTS[:16]), LABELS[:16], batch_sizes=[8], min_seconds=0, min_rounds=2
    )
    result.check()
    result.to_html(tmp_path / "bench.html")
    assert "ONNX Runtime" in (tmp_path / "bench.html").read_text()
    result.save(tmp_path / "bench.json")
    again = trainkit.Benchmark.load(tmp_path / "bench.json")
    assert again.recommend() == result.recommend()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: trainkit.train(TEXTS, LABELS[1:], model="simple"), "150 texts and 149 labels"),
        (lambda: trainkit.train("sample", LABELS, model="simple"), "labels go with a list"),
        (lambda: trainkit.train("sample", model="simple", epochs=0), "epochs must be at least 1"),
        (lambda: trainkit.train("sample", model="simple", epochs="3"), "a whole number, not '3'"),
        (lambda: trainkit.train("sample", resume="x", epochs=3), "data, epochs cannot be given"),
        (lambda: trainkit.open_model("nowhere/at/all"), "nowhere/at/all"),
        (lambda: trainkit.Bundle("nowhere"), "nowhere"),
        (lambda: trainkit.open_model("x", max_length=0), "max_length must be at least 1"),
    ],
    ids=range(8),
)
def test_wrong_input_raises_one_sentence(call, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(trainkit.InputError, match=sentence):
        call()


class Frame(dict):
    """What is used of a pandas DataFrame."""

    @property
    def columns(self):
        return list(self)


def test_a_split_has_the_names_that_training_knows():
    frame = Frame(text=["a"], label=["x"])
    splits = {"train": Frame(text=["b"], label=["x"]), "validation": frame}
    assert examples_of(splits, None, Columns(), "valid") == [Example("a", "x")]
    with pytest.raises(trainkit.InputError, match="no split 'test': train, validation"):
        examples_of(splits, None, Columns(), None)
    with pytest.raises(trainkit.InputError, match="more than one split 'valid'"):
        examples_of(splits | {"dev": frame}, None, Columns(), "valid")


def test_a_run_opens_with_its_own_settings_alone(tmp_path):
    (tmp_path / CHECKPOINT).touch()
    for option in ({"max_length": 8}, {"base": "x"}):
        with pytest.raises(trainkit.InputError, match="is a run, which has its own"):
            trainkit.open_model(tmp_path, **option)


def test_an_unknown_option_is_a_type_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'epoch'"):
        trainkit.train("sample", model="simple", epoch=3)


@pytest.mark.parametrize(
    ("types", "structs"),
    [(TrainOptions, (ModelSpec, TrainConfig)), (ExportOptions, (ExportSettings,))],
)
def test_types_for_editors_are_those_of_the_settings(types, structs):
    fields = {f.name: f.type for struct in structs for f in msgspec.structs.fields(struct)}
    hints = typing.get_type_hints(types)
    assert set(hints) == set(fields) - {"kind", "format"}
    for name, hint in hints.items():
        taken = set(flat(fields[name]))
        assert taken <= set(flat(hint)), name
        extra = {"auto"} if name == "learning_rate" else set()
        assert set(flat(hint)) - taken <= {type(None)} | extra, name


def flat(annotation):
    """Yield the classes and the literal values in an annotation."""
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        yield from typing.get_args(annotation)
    elif origin is typing.Annotated:
        yield from flat(typing.get_args(annotation)[0])
    elif typing.get_args(annotation):
        for part in typing.get_args(annotation):
            yield from flat(part)
    else:
        yield annotation


# What one side has alone: of the command, how its result is printed and kept; of the function,
# what has no spelling on a command line.
COMMAND_ONLY = {"as_json", "out", "formats"}
FUNCTION_ONLY = {"labels", "on_progress", "command", "format"}
PAIRS = {
    ("train",): (trainkit.train,),
    ("evaluate",): (trainkit.evaluate,),
    ("verify",): (trainkit.verify,),
    ("export",): (trainkit.open_model, trainkit.TrainedModel.export),
    ("bench", "run"): (trainkit.benchmark,),
    ("bench", "recommend"): (trainkit.Benchmark.recommend,),
}
RECOMMEND_ONLY = {"throughput", "bundle", "result"}


@pytest.mark.parametrize("path", PAIRS, ids=" ".join)
def test_every_option_of_a_command_is_a_parameter_of_its_function(path):
    command = cli
    for name in path:
        command = command.commands[name]
    parameters = {}
    for function in PAIRS[path]:
        parameters |= inspect.signature(function).parameters
    taken = {name for name in parameters if name not in FUNCTION_ONLY | {"self", "out"}}
    options = {option.name: option for option in command.params}
    alone = COMMAND_ONLY | (RECOMMEND_ONLY if path[-1] == "recommend" else set())
    assert set(options) - alone == taken
    for name in taken:
        default = parameters[name].default
        if default is not inspect.Parameter.empty and name not in ("data", "source"):
            assert same(options[name].default, default), name


def same(option, parameter):
    """Compare a default of click's with one of Python's."""
    if option in (None, (), []) or "UNSET" in str(option):
        return parameter in (None, (), False)
    if isinstance(option, list | tuple):
        return tuple(option) == tuple(parameter)
    return str(option) == str(parameter)


def test_importing_trainkit_is_fast_and_loads_nothing_heavy():
    program = (
        "import sys, time; began = time.perf_counter(); import trainkit;"
        "trainkit.InputError; took = time.perf_counter() - began;"
        "print(took, *sorted(set(sys.modules) & {'numpy', 'torch', 'msgspec', 'rich'}))"
    )
    for _ in range(3):  # another process may hold the cores
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        took, *heavy = done.stdout.split()
        assert heavy == []
        if float(took) < 0.05:
            return
        time.sleep(0.1)
    pytest.fail(f"import trainkit took {took} s")


def test_every_public_name_is_there_and_documented():
    for name in trainkit.__all__:
        assert getattr(trainkit, name).__doc__
    assert "epochs (default 10): Passes over the training texts." in trainkit.train.__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        trainkit.nothing  # noqa: B018


def test_an_unforeseen_error_asks_for_a_report(monkeypatch):
    from click.testing import CliRunner

    def broken(*_, **__):
        raise KeyError("a bug")

    monkeypatch.setattr("trainkit.api.models.Bundle", broken)
    monkeypatch.setitem(vars(trainkit), "Bundle", broken)
    result = CliRunner().invoke(cli, ["inspect", "x"])
    assert result.exit_code == 70
    assert "trainkit itself failed (KeyError" in result.stderr
    assert "trainkit --debug" in result.stderr
    assert isinstance(CliRunner().invoke(cli, ["--debug", "inspect", "x"]).exception, KeyError)

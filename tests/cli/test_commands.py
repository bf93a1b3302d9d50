"""The commands at work: from a file of questions to a verified bundle and its answers."""

import json
import re

import click
import msgspec
import pytest

from trainkit.bench.result import load
from trainkit.cli import cli
from trainkit.commands.predict import CHUNK
from trainkit.data.splits import Splits, load_sample
from trainkit.export import parity_cases
from trainkit.serve import bundle
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.run import train
from trainkit.trainer.run_config import ModelSpec


def document(result):
    """Return the one JSON document that a command printed."""
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def answers(result):
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def simple(data, runs, *more):
    training = ("--model", "simple", "--epochs", "1")
    return "train", "--data", data, "--runs", runs, "--name", "new", *training, *more


def commands(group=cli, path=()):
    """Yield the arguments that name each command and group."""
    yield path
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield *path, name


GROUPS = [("data",), ("bench",)]


@pytest.mark.parametrize(
    "path",
    list(commands()),
    ids=" ".join,
)
def test_every_command_has_help_with_an_example(path, trainkit):
    result = trainkit(*path, "--help")
    assert result.exit_code == 0
    examples = re.findall(r"^ +(trainkit .*)$", result.stdout, re.MULTILINE)
    assert any(example.startswith(" ".join(["trainkit", *path])) for example in examples)
    assert trainkit(*path, "-h").stdout == result.stdout


def test_training_makes_a_run_and_points_latest_at_it(trainkit, questions, tmp_path):
    runs = tmp_path / "runs"
    result = trainkit(*simple(questions, runs))
    assert result.exit_code == 0, result.output
    assert "Held-out accuracy" in result.stdout
    assert "Epoch 001 | train loss" in result.stderr
    assert (runs / "latest").resolve() == runs / "new"
    files = {path.name for path in (runs / "new").iterdir()}
    names = {"checkpoint.json", "config.toml", "history.json", "tokenizer.json"}
    names |= {"valid.json", "test.json", "report.html"}
    assert files == names | {"weights-001.safetensors"}


def test_training_tells_the_same_as_json(trainkit, questions, tmp_path):
    found = document(trainkit(*simple(questions, tmp_path / "runs", "--json")))
    assert found["run"] == str(tmp_path / "runs" / "new")
    assert found["best"]["epoch"] == 1
    assert found["valid"] == json.loads((tmp_path / "runs" / "new" / "valid.json").read_text())
    assert found["test"] == json.loads((tmp_path / "runs" / "new" / "test.json").read_text())


def interrupted(*_):
    raise KeyboardInterrupt


def test_ctrl_c_in_a_refit_says_how_to_go_on(trainkit, questions, tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    with monkeypatch.context() as patch:
        patch.setattr("trainkit.console.TrainingBar.refit", interrupted)
        result = trainkit(*simple(questions, runs, "--refit"))
    assert result.exit_code == 130
    assert result.stderr.endswith(f"To go on: trainkit train --resume {runs / 'new'}\n")
    assert not (runs / "latest").exists()
    assert trainkit("train", "--resume", runs / "new").exit_code == 0
    assert (runs / "latest").resolve() == runs / "new"


def test_the_link_to_the_latest_run_can_be_gone_on_with(trainkit, questions, tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    epochs = iter(range(9))

    def second(self, result):
        if next(epochs):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trainkit.console.TrainingBar.epoch", second)
        result = trainkit(*simple(questions, runs, "--epochs", "3"))
    assert result.exit_code == 130
    assert (runs / "latest").resolve() == runs / "new"
    assert trainkit("train", "--resume", runs / "latest").exit_code == 0
    assert (runs / "latest").resolve() == runs / "new"
    assert len(json.loads((runs / "new" / "history.json").read_text())) == 3


def test_ctrl_c_in_the_first_epoch_leaves_nothing(trainkit, questions, tmp_path, monkeypatch):
    monkeypatch.setattr("trainkit.console.TrainingBar.step", interrupted)
    result = trainkit(*simple(questions, tmp_path / "runs"))
    assert result.exit_code == 130
    assert result.stderr.endswith("Interrupted before anything was saved.\n")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("brackets", ["[{}]", "[/{}]", "[bold]{}"])
def test_brackets_in_labels_and_paths_are_no_markup(brackets, trainkit, tmp_path):
    data, runs = tmp_path / "data.jsonl", tmp_path / brackets.format("runs")
    rows = [{"text": e.text, "label": brackets.format(e.label)} for e in load_sample()[:150]]
    data.write_text("\n".join(map(json.dumps, rows)))
    result = trainkit(*simple(data, runs))
    assert result.exit_code == 0, repr(result.exception)
    assert brackets.format("NUM") in result.stdout
    assert str(runs) in result.stdout.replace("\n", "")
    shown = trainkit("data", "stats", data)
    assert brackets.format("NUM") in shown.stdout, repr(shown.exception)


def test_a_long_path_is_printed_in_one_piece(trainkit, questions, tmp_path):
    runs = tmp_path / ("long" * 30)
    result = trainkit(*simple(questions, runs))
    assert str(runs / "new") in result.stdout


@pytest.fixture
def trained(copied, tmp_path, monkeypatch):
    """Return a copy of the tiny run as runs/latest of the working directory."""
    run = copied("run")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "latest").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    return run


@pytest.mark.slow
def test_export_takes_the_latest_run_and_puts_the_bundles_into_it(trainkit, trained, splits):
    formats = ("--format", "onnx", "--format", "torchscript")
    result = trainkit("export", *formats, "--data", "sample")
    assert result.exit_code == 0, result.output
    found = re.findall(r"(\d+) parity cases, largest", " ".join(result.stdout.split()))
    assert len(found) == 2
    for name in ("onnx", "torchscript"):
        manifest = bundle.open_bundle(trained / name).manifest
        assert manifest.format == name
        assert manifest.parity["failed"] == 0
        assert manifest.accuracy["count"] == len(splits.test)


@pytest.mark.slow
def test_an_export_may_be_a_triton_repository(trainkit, tiny_run, tmp_path):
    result = trainkit("export", tiny_run, "--format", "triton", "--out", tmp_path / "models")
    assert result.exit_code == 0, result.output
    (model,) = (tmp_path / "models").iterdir()
    assert model.name == tiny_run.name
    assert {"config.pbtxt", "labels.txt", "1"} <= {path.name for path in model.iterdir()}
    assert (model / "1" / "model.onnx").is_file()


def test_an_export_tells_its_manifest_as_json(trainkit, trained, tmp_path):
    arguments = ("--format", "torchscript", "--out", tmp_path / "out", "--json")
    (found,) = document(trainkit("export", *arguments))
    assert found == json.loads((tmp_path / "out" / bundle.MANIFEST).read_text())


@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_inspect_shows_what_the_bundle_is(format, trainkit, tiny_bundles):
    result = trainkit("inspect", tiny_bundles[format])
    assert result.exit_code == 0, result.output
    manifest = bundle.open_bundle(tiny_bundles[format]).manifest
    for part in (f"{format}, fp32", "simple", "ABBR, DESC", "input_ids int64", "of each filter"):
        assert part in result.stdout
    assert f"temperature {manifest.temperature:.3f}" in " ".join(result.stdout.split())
    found = document(trainkit("inspect", tiny_bundles[format], "--json"))
    assert found == json.loads((tiny_bundles[format] / bundle.MANIFEST).read_text())


@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_verify_repeats_the_proof(format, trainkit, tiny_run, tiny_bundles):
    for against in ([], ["--against", tiny_run]):
        result = trainkit("verify", tiny_bundles[format], *against)
        assert result.exit_code == 0, result.output
        assert "parity cases" in result.stdout
        assert "FAILED" not in result.stdout
        found = document(trainkit("verify", tiny_bundles[format], *against, "--json"))
        assert found["failed"] == 0
        assert found["cases"] == bundle.open_bundle(tiny_bundles[format]).manifest.parity["cases"]


@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_verify_fails_where_one_logit_is_another(format, trainkit, copied):
    """The hashes are right: only the comparison itself can tell."""
    folder = copied(format)
    cases = parity_cases.load_cases(folder / parity_cases.PARITY_FILE)
    changed = cases[40].expected.copy()
    changed[-1, 3] += 0.01
    cases[40] = cases[40]._replace(expected=changed)
    parity_cases.save_cases(folder / parity_cases.PARITY_FILE, cases)
    bundle.write_manifest(folder, json_manifest(folder))
    result = trainkit("verify", folder)
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    assert cases[40].name in result.stdout
    assert result.stderr.splitlines()[-1].startswith("Error: parity failed: 1 of ")
    as_json = trainkit("verify", folder, "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["failed"] == 1


def json_manifest(folder):
    """Read a manifest whose files no longer are what it says."""
    return msgspec.json.decode((folder / bundle.MANIFEST).read_bytes(), type=bundle.Manifest)


def test_verify_fails_against_a_run_with_other_weights(trainkit, tiny_bundles, questions, tmp_path):
    assert trainkit(*simple(questions, tmp_path / "runs")).exit_code == 0
    result = trainkit("verify", tiny_bundles["onnx"], "--against", tmp_path / "runs" / "new")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: the tokenizer of ")


def test_verify_computes_the_run_anew(trainkit, tiny_bundles, splits, tmp_path):
    """Of the same texts, so with the same tokenizer and labels, and another seed."""
    few = Splits(splits.train[:60], splits.valid[:20], splits.test[:20])
    config = TrainConfig(epochs=1, learning_rate=3e-3, seed=2)
    other = train(ModelSpec(kind="simple"), few, config, tmp_path / "run").folder
    result = trainkit("verify", tiny_bundles["onnx"], "--against", other)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: parity failed: ")


def test_a_parity_file_without_cases_proves_nothing(trainkit, copied):
    folder = copied("onnx")
    parity_cases.save_cases(folder / parity_cases.PARITY_FILE, [])
    bundle.write_manifest(folder, json_manifest(folder))
    assert trainkit("verify", folder).exit_code == 1


@pytest.mark.parametrize("kept_share", [pytest.param(0), 0.5, 0.9])
def test_a_parity_file_that_cannot_be_read_is_an_input_error(kept_share, trainkit, copied):
    folder = copied("onnx")
    path = folder / parity_cases.PARITY_FILE
    content = path.read_bytes()
    path.write_bytes(content[: int(kept_share * len(content))])
    bundle.write_manifest(folder, json_manifest(folder))
    result = trainkit("verify", folder)
    assert result.exit_code == 2, repr(result.exception)
    assert f"{path} cannot be read" in result.stderr


def test_a_compressed_logit_that_is_damaged_is_an_input_error(trainkit, copied):
    folder = copied("onnx")
    path = folder / parity_cases.PARITY_FILE
    content = bytearray(path.read_bytes())
    content[60:90] = b"\xff" * 30  # inside the first compressed member
    path.write_bytes(content)
    bundle.write_manifest(folder, json_manifest(folder))
    result = trainkit("verify", folder)
    assert result.exit_code == 2, repr(result.exception)
    assert f"{path} cannot be read" in result.stderr


def test_run_and_bundles_have_the_same_accuracy(trainkit, tiny_run, tiny_bundles):
    sources = (tiny_run, *tiny_bundles.values())
    command = ("--data", "sample", "--split", "all", "--json")
    first, *others = (document(trainkit("evaluate", source, *command)) for source in sources)
    assert first["count"] == len(load_sample())
    for other in others:
        assert other["confusion"] == first["confusion"]
        assert other["accuracy"] == first["accuracy"]
        assert other["loss"] == pytest.approx(first["loss"], rel=1e-5)
    shown = trainkit("evaluate", tiny_bundles["onnx"], "--data", "sample", "--split", "all")
    assert f"{100 * first['accuracy']:.1f}%" in shown.stdout


@pytest.mark.slow
def test_a_runs_own_test_texts_are_scored_again(trainkit, questions, tmp_path):
    """Those of its seed: another would have most of them among its training texts."""
    run = tmp_path / "runs" / "new"
    assert trainkit(*simple(questions, tmp_path / "runs", "--seed", "1")).exit_code == 0
    assert trainkit("export", run, "--format", "onnx").exit_code == 0
    expected = json.loads((run / "test.json").read_text())
    for source in (run, run / "onnx"):
        command = ("evaluate", source, "--data", questions, "--split", "test", "--json")
        found = document(trainkit(*command))
        assert found["confusion"] == expected["confusion"]


def test_a_run_with_a_test_file_has_no_other_test_texts(trainkit, questions, refused, tmp_path):
    """What would be split off its data, it was trained on."""
    test = tmp_path / "test.csv"
    test.write_text("text,label\nWho are you?,HUM\nWhere is Lima?,LOC\n")
    runs = tmp_path / "runs"
    assert trainkit(*simple(questions, runs, "--test", test)).exit_code == 0
    told = [f"its test set is {test}", f"use --data {test}"]
    refused("evaluate", runs / "new", "--data", questions, "--split", "test", told=told)
    assert document(trainkit("evaluate", runs / "new", "--data", test, "--json"))["count"] == 2


def test_a_single_file_is_scored_whole(trainkit, tiny_bundles, questions):
    found = document(trainkit("evaluate", tiny_bundles["onnx"], "--data", questions, "--json"))
    assert found["count"] == 150


def test_predict_answers_arguments_and_lines_alike(trainkit, tiny_run, tiny_bundles):
    texts = ["Who was Galileo?", "How far is Mars?", "Où est la tour Eiffel? 🗼", '"quoted" \\n']
    given = answers(trainkit("predict", tiny_bundles["onnx"], *texts))
    assert [answer["text"] for answer in given] == texts
    for answer in given:
        assert list(answer) == ["text", "label", "score", "scores", "truncated"]
        assert (
            answer["score"] == max(answer["scores"].values()) == answer["scores"][answer["label"]]
        )
        assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-5)
    piped = trainkit("predict", tiny_bundles["onnx"], stdin="\r\n".join(texts))
    assert answers(piped) == given
    for source in (tiny_run, tiny_bundles["torchscript"]):
        others = answers(trainkit("predict", source, *texts))
        assert [answer["label"] for answer in others] == [answer["label"] for answer in given]


def test_predict_says_which_text_was_cut(trainkit, tiny_bundles):
    found = answers(trainkit("predict", tiny_bundles["onnx"], "Who ?", "Who ? " * 400))
    assert [answer["truncated"] for answer in found] == [False, True]


def test_predict_keeps_the_order_of_many_lines(trainkit, tiny_bundles):
    texts = [f"How far is {'very ' * (n % 7)}number {n}?" for n in range(CHUNK + 9)]
    found = answers(trainkit("predict", tiny_bundles["onnx"], stdin="\n".join(texts)))
    assert [answer["text"] for answer in found] == texts


def test_no_line_gives_no_answer(trainkit, tiny_bundles):
    assert answers(trainkit("predict", tiny_bundles["onnx"], stdin="")) == []


def test_statistics_are_one_document(trainkit, questions):
    found = document(trainkit("data", "stats", questions, "--json"))
    assert sum(split["rows"] for split in found["splits"].values()) == 150
    assert set(found["splits"]) == {"train", "valid", "test"}


def test_the_version_is_the_packages(trainkit):
    from trainkit import __version__

    assert trainkit("--version").stdout.split()[-1] == __version__


@pytest.mark.slow
def test_a_benchmark_is_measured_kept_and_reported(trainkit, tiny_run, tiny_bundles, tmp_path):
    result, shown = tmp_path / "bench.json", ("report.html", "report.md", "report.csv")
    engines = (f"eager:{tiny_run}", tiny_bundles["onnx"])
    quick = ("--min-seconds", "0", "--min-rounds", "2", "--batch-size", "8", "--length", "4")
    done = trainkit("bench", "run", *engines, *quick, "--out", result)
    assert done.exit_code == 0, done.output
    made = load(result)
    assert [engine.name for engine in made.engines] == ["PyTorch eager", "ONNX Runtime"]
    assert {work.name for work in made.workloads} == {"texts, batch 8", "grid, 8 x 4"}
    options = ("--html", "--markdown", "--csv")
    files = [
        part for one in zip(options, shown, strict=True) for part in (one[0], tmp_path / one[1])
    ]
    done = trainkit("bench", "report", result, *files)
    assert done.exit_code == 0, done.output
    for name in shown:
        assert "ONNX Runtime" in (tmp_path / name).read_text()

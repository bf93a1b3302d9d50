"""Every fault of a user, a disk or a network: exit code 2, one sentence, and nothing lost."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainkit.export import parity
from trainkit.serve.bundle import MANIFEST, open_bundle
from trainkit.serve.errors import InputError

ROWS = "".join(f"Where is town {i} ?,LOC\nWho founded town {i} ?,HUM\n" for i in range(9))


def train(data, runs, *more):
    return "train", "--data", data, "--runs", runs, "--name", "new", *more


def simple(data, runs, *more):
    return *train(data, runs, "--model", "simple", "--epochs", "1"), *more


# Data files.


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("cp1252.csv", "text,label\nCafé ?,LOC\n".encode("cp1252"), ["line 2", "as UTF-8"]),
        ("empty.csv", b"", ["holds no examples", "one labelled text a line"]),
        ("sheet.xlsx", b"PK\3\4", ["'.xlsx'", "convert it"]),
        ("phrases.csv", b"phrase,label\nWho ?,HUM\n", ["'phrase', 'label'", "--text-column"]),
        ("topics.csv", b"text,about\nWho ?,HUM\n", ["'text', 'about'", "--label-column"]),
        ("blank.csv", b"text,label\nWho ?,HUM\n ,LOC\n", ["line 3: empty text", "remove"]),
        ("unlabelled.csv", b"text,label\nWho ?,\n", ["line 2: empty label", "remove"]),
        ("one.csv", b"text,label\nWho ?,HUM\nWho is it ?,HUM\n", ["'HUM'", "another class"]),
        (
            "small.csv",
            f"text,label\n{ROWS}Why ?,DESC\nHow ?,DESC\n".encode(),
            ["'DESC' (2 rows", "merge or drop the class"],
        ),
    ],
)
def test_a_faulty_data_file_is_named_with_its_fault(name, content, told, refused, tmp_path, runs):
    path = tmp_path / name
    path.write_bytes(content)
    assert str(path) in refused(*simple(path, runs), told=told)
    assert str(path) in refused("data", "stats", path, told=told)


def test_a_path_that_does_not_exist_is_named(refused, tmp_path, runs, tiny_bundles):
    missing = tmp_path / "nowhere.csv"
    told = [f"{missing} does not exist", "check the path"]
    refused(*simple(missing, runs), told=told)
    refused("data", "stats", missing, told=told)
    refused("evaluate", tiny_bundles["onnx"], "--data", missing, told=told)
    refused("export", tmp_path / "run", "--data", missing, told=told)


def test_a_folder_without_train_is_named(refused, tmp_path, runs):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "test.csv").write_text("text,label\nWho ?,HUM\n")
    refused(*simple(folder, runs), told=[f"{folder} has no train file", "train.csv"])


def test_a_named_column_that_is_not_there(refused, questions, runs):
    refused(
        *simple(questions, runs, "--text-column", "phrase"),
        told=[str(questions), "'phrase'", "'text', 'label'", "--text-column"],
    )


def test_a_label_in_test_that_train_lacks(refused, tmp_path, runs):
    data, test = tmp_path / "all.csv", tmp_path / "test.csv"
    data.write_text(f"text,label\n{ROWS}")
    test.write_text("text,label\nWhy ?,DESC\n")
    told = [str(data), f"'DESC' (1 in {test})", "add such examples to train or remove"]
    refused(*simple(data, runs, "--test", test), told=told)


def test_a_label_that_the_model_lacks(refused, tmp_path, tiny_run, tiny_bundles):
    data = tmp_path / "weather.csv"
    data.write_text("text,label\nIs it raining ?,WEATHER\n")
    for source in (tiny_run, tiny_bundles["onnx"]):
        refused("evaluate", source, "--data", data, told=["'WEATHER'", "ABBR, DESC, ENTY"])
    out = tmp_path / "out"
    export = ("export", tiny_run, "--format", "torchscript", "--out", out, "--data", data)
    refused(*export, told=["'WEATHER'"])


# Texts to classify.


@pytest.mark.parametrize("texts", [["", "Who ?"], ["Who ?", " \t"]])
def test_an_empty_argument_is_counted_out(texts, refused, tiny_bundles):
    number = 1 + [bool(text.strip()) for text in texts].index(False)
    refused(
        "predict", tiny_bundles["onnx"], *texts, told=[f"text {number} of 2 is empty", "leave it"]
    )


@pytest.mark.parametrize("stdin", ["Who ?\n\nWhy ?\n", "Who ?\n \u2003\n"])
def test_an_empty_line_is_named_by_its_number(stdin, refused, tiny_bundles):
    refused("predict", tiny_bundles["onnx"], stdin=stdin, told=["line 2", "remove it"])


def test_standard_input_that_is_not_utf8(refused, tiny_bundles):
    refused("predict", tiny_bundles["onnx"], stdin=b"Who ?\nCaf\xe9 ?\n", told=["UTF-8"])


def test_workers_of_a_bundle_that_pytorch_computes(refused, tiny_bundles, tmp_path):
    file = tmp_path / "questions.txt"
    file.write_text("Who ?\n")
    options = ("--file", file, "--output", tmp_path / "out.jsonl", "--workers", 2)
    told = ["--workers is for ONNX bundles", "export to ONNX"]
    refused("predict", tiny_bundles["torchscript"], *options, told=told)
    assert not (tmp_path / "out.jsonl").exists()


def test_an_argument_that_is_not_utf8(refused, tiny_bundles):
    """Python hands on the bytes of such an argument as lone surrogates."""
    refused("predict", tiny_bundles["onnx"], "Who ?", "Caf\udce9 ?", told=["text 2 of 2"])


# Options.


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--model", "simple", "--backbone", "minilm"], ["no backbone", "--model prefix"]),
        (["--model", "finetune"], ["needs a backbone", "--backbone minilm"]),
        (["--model", "prefix", "--prefix-length", "0"], ["--prefix-length must be at least 1"]),
        (["--model", "simple", "--epochs", "-1"], ["epochs", "at least 1, not -1"]),
        (["--model", "simple", "--batch-size", "0"], ["--batch-size", "at least 1, not 0"]),
        (["--model", "simple", "--dropout", "2"], ["dropout", "[0, 1), not 2"]),
        (["--model", "simple", "--dropout", "nan"], ["dropout", "not nan"]),
        (["--model", "simple", "--learning-rate", "nan"], ["--learning-rate", "above 0, not nan"]),
        (["--model", "simple", "--warmup-share", "1"], ["--warmup-share", "[0, 1), not 1"]),
        (["--model", "simple", "--min-count", "999"], ["999 times", "lower min_count"]),
        pytest.param(["--model", "simple", "--max-length", "0"], ["--max-length", "0"]),
        pytest.param(["--model", "simple", "--max-length", "-1"], ["--max-length", "-1"]),
        pytest.param(["--model", "simple", "--seed", "-1"], ["seed", "-1"]),
        pytest.param(["--model", "simple", "--seed", str(2**32)], ["seed", str(2**32)]),
        (["--model", "simple", "--epochs", "many"], ["'many'"]),
        (["--model", "huge"], ["'huge'", "'simple', 'prefix', 'finetune'"]),
        (["--model", "simple", "--device", "tpu"], ["'tpu'"]),
        (["--model", "simple", "--labels", "fine"], ["fine labels are for TREC"]),
    ],
    ids=" ".join,
)
def test_settings_that_do_not_work(options, told, refused, questions, runs):
    refused(*train(questions, runs, *options), told=told)


def test_several_wrong_settings_are_told_at_once(refused, questions, runs):
    wrong = ("--epochs", "-1", "--patience-epochs", "0", "--label-smoothing", "1.5")
    refused(
        *simple(questions, runs, *wrong),
        told=["--epochs", "--patience-epochs", "--label-smoothing"],
    )


def test_one_place_for_two_bundles(refused, tiny_run, tmp_path):
    formats = ("--format", "onnx", "--format", "torchscript")
    told = ["--out names one bundle", "one --format at a time"]
    refused("export", tiny_run, *formats, "--out", tmp_path / "out", told=told)


def test_a_run_that_exists_is_kept(refused, questions, runs):
    (runs / "new").mkdir()
    (runs / "new" / "notes.txt").write_text("mine")
    refused(*simple(questions, runs), told=[f"{runs / 'new'} exists already", "--name"])


def test_runs_that_cannot_be_made(refused, questions, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(*simple(questions, tmp_path / "file"), told=["cannot be made", "--runs"])


def test_the_name_of_the_link_is_no_name_for_a_run(refused, questions, runs):
    """Otherwise the link ``latest`` cannot be made once the training is over."""
    refused(*simple(questions, runs, "--name", "latest"), told=["latest", "--name"])


def test_a_folder_where_the_link_should_be(refused, questions, runs):
    (runs / "latest").mkdir()
    refused(*simple(questions, runs), told=[str(runs / "latest")])


# Backbones.


@pytest.fixture
def offline(monkeypatch):
    """No network at once, instead of five tries to find one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def backbone(tmp_path):
    """Return the folder of a tiny BERT without a tokenizer."""
    from transformers import BertConfig, BertModel

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
    config = BertConfig(**sizes, intermediate_size=8, vocab_size=20, max_position_embeddings=16)
    BertModel(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def on(backbone, data, runs, kind="finetune"):
    return train(data, runs, "--model", kind, "--backbone", backbone)


@pytest.mark.usefixtures("offline")
def test_a_backbone_that_is_nowhere(refused, questions, runs):
    for kind in ("prefix", "finetune"):
        refused(
            *on("nobody/no-such-encoder", questions, runs, kind),
            told=["backbone 'nobody/no-such-encoder' is not a directory", "hub id and a network"],
        )
    told = ["'nobody/no-such-encoder' is not a directory", "hub id"]
    refused("data", "stats", questions, "--tokenizer", "nobody/no-such-encoder", told=told)


def test_a_backbone_folder_without_config(refused, questions, runs, tmp_path):
    (tmp_path / "bert").mkdir()
    told = [f"'{tmp_path / 'bert'}' has no config.json", "give a Hugging Face folder"]
    refused(*on(tmp_path / "bert", questions, runs), told=told)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("kept_share", [0, 0.5, 0.99])
def test_a_backbone_with_half_of_its_weights_file(kept_share, refused, backbone, questions, runs):
    weights = backbone / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: int(kept_share * len(content))])
    told = [f"backbone '{backbone}' cannot be loaded", "Hugging Face folder"]
    refused(*on(backbone, questions, runs), told=told)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("config", ["{}", '{"model_type": "no-such-model"}', '{"model_type"', "[]"])
def test_a_backbone_whose_config_is_not_one(config, refused, backbone, questions, runs):
    (backbone / "config.json").write_text(config)
    refused(*on(backbone, questions, runs), told=[str(backbone)])


@pytest.mark.usefixtures("offline")
def test_a_backbone_without_tokenizer(refused, backbone, questions, runs):
    refused(*on(backbone, questions, runs), told=["no tokenizer", "tokenizer.json"])


@pytest.mark.usefixtures("offline")
def test_a_backbone_that_lacks_a_layer(refused, backbone, questions, runs):
    change_json(backbone / "config.json", "num_hidden_layers", value=2)
    told = ["lacks 16 of the weights", "encoder.layer.1.", "give a complete checkpoint"]
    refused(*on(backbone, questions, runs), told=told)


@pytest.mark.usefixtures("offline")
def test_a_backbone_that_is_a_file(refused, questions, runs):
    refused(*on(questions, questions, runs), told=[str(questions)])


# Runs.


def change(path, position):
    """Flip the lowest bit of one byte."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def change_json(path, *keys, value):
    """Set one value of a JSON file."""
    document = json.loads(path.read_text())
    place = document
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(document))


@pytest.fixture
def refused_run(refused, tmp_path):
    """Return a function: whatever reads a run refuses this one."""

    def check(run, told):
        refused("predict", run, "Who ?", told=told)
        refused("evaluate", run, "--data", "sample", told=told)
        refused("export", run, "--out", tmp_path / "out", told=told)

    return check


@pytest.mark.parametrize("kept_share", [0, 0.3, 0.99])
def test_a_truncated_checkpoint(kept_share, copied, refused_run):
    path = copied("run") / "checkpoint.json"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept_share * len(content))])
    refused_run(path.parent, told=[f"{path} is damaged", "train again"])


@pytest.mark.parametrize(
    ("keys", "value", "told"),
    [
        (["colour"], "red", "`colour`"),
        (["model", "colour"], "red", "`colour`"),
        (["format_version"], 2, "format 2"),
        (["model", "kind"], "huge", "huge"),
        (["model"], None, "model"),
        (["weights"], "weights-999.safetensors", "was changed after the training"),
        pytest.param(["seed"], "x", "seed"),
        pytest.param(["model", "dropout"], 5, "dropout"),
        pytest.param(["model", "labels"], ["HUM"], "labels"),
        pytest.param(["model", "labels"], ["A", "B", "C", "D", "E", "F", "G"], "again"),
        pytest.param(["model", "max_length"], 64, "again"),
        pytest.param(["model", "text_cnn", "embedding_size"], 64, "again"),
        pytest.param(["model", "text_cnn", "filters"], 0, "filters"),
        pytest.param(["model", "text_cnn", "vocabulary_size"], -1, "vocabulary_size"),
    ],
    ids=str,
)
def test_a_checkpoint_with_a_wrong_value(keys, value, told, copied, refused_run):
    path = copied("run") / "checkpoint.json"
    change_json(path, *keys, value=value)
    refused_run(path.parent, told=[str(path.parent), told])


def test_one_changed_byte_in_a_label_of_the_checkpoint(copied, refused_run):
    path = copied("run") / "checkpoint.json"
    change(path, path.read_bytes().index(b'"NUM"') + 1)
    refused_run(path.parent, told=[str(path), "train again"])


@pytest.mark.parametrize("position", [0, 100_000, -1])
def test_one_changed_byte_in_the_weights(position, copied, refused_run):
    run = copied("run")
    weights = next(run.glob("weights-*"))
    change(weights, position)
    refused_run(run, told=[f"{weights} is missing or damaged", "train again"])


@pytest.mark.parametrize("pattern", ["weights-*", "tokenizer.json", "checkpoint.json"])
def test_a_run_without_one_of_its_files(pattern, copied, refused, tmp_path):
    run = copied("run")
    file = next(run.glob(pattern))
    file.unlink()
    refused("predict", run, "Who ?", told=[str(run), file.name])
    refused("export", run, "--out", tmp_path / "out", told=[str(run), file.name, "train"])


def test_a_run_with_another_tokenizer(copied, refused_run):
    run = copied("run")
    tokenizer = run / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"lowercase": true', '"lowercase": false'))
    refused_run(run, told=[f"{tokenizer} is missing or damaged", "train again"])


def test_a_source_that_is_neither_run_nor_bundle(refused, tmp_path):
    for source in (tmp_path, tmp_path / "nowhere"):
        told = [f"{source} is neither a bundle", "nor a run", "train or export named"]
        refused("predict", source, "Who ?", told=told)
        refused("evaluate", source, "--data", "sample", told=told)
        refused("export", source, told=[*told, "trainkit train"])


# Bundles.

FILES = {
    name: ["config.json", model, "parity.npz", "tokenizer.json", "tokenizer_config.json"]
    for name, model in (("onnx", "model.onnx"), ("torchscript", "model.pt"))
}
EACH_FILE = [(format, name) for format, names in FILES.items() for name in names]


@pytest.fixture
def refused_bundle(refused):
    """Return a function: whatever reads a bundle refuses this one."""

    def check(folder, told):
        refused("inspect", folder, told=told)
        refused("verify", folder, told=told)
        refused("predict", folder, "Who ?", told=told)
        refused("evaluate", folder, "--data", "sample", told=told)

    return check


@pytest.mark.parametrize("format", FILES)
def test_the_files_that_are_damaged_here_are_all_there_are(format, tiny_bundles):
    found = sorted(path.name for path in tiny_bundles[format].iterdir())
    assert found == sorted([*FILES[format], MANIFEST])


@pytest.mark.parametrize("share", [0, 0.5, 1], ids=["start", "middle", "end"])
@pytest.mark.parametrize(("format", "name"), EACH_FILE)
def test_one_changed_byte_in_a_bundle(format, name, share, copied, refused_bundle):
    file = copied(format) / name
    change(file, int(share * (file.stat().st_size - 1)))
    refused_bundle(file.parent, told=[f"{file} is not the file", "copy the bundle again"])


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (b'"highest value of each filter"', "was changed after the export"),
        (b'"ABBR"', "was changed after the export"),
        (b'"label_agreement": 1', "was changed after the export"),
        (b'"sha256": "', "was changed after the export"),
        (b'"format_version": 2', "bundle format 3"),
        (b'"onnx"', "is damaged"),
    ],
)
def test_one_changed_byte_in_a_value_of_the_manifest(value, told, copied, refused_bundle):
    file = copied("onnx") / MANIFEST
    content = file.read_bytes()
    inside = len(value) - 2 if value.endswith(b'"') and b":" not in value else len(value) - 1
    inside += value.endswith(b': "')
    change(file, content.index(value) + inside)
    refused_bundle(file.parent, told=[str(file), told, "again"])


@pytest.mark.parametrize("bit", [0, 5, 7])
def test_no_byte_of_the_manifest_can_change_unnoticed(bit, copied):
    """All of them, every eleventh: the refusal is ours, or the meaning is the same."""
    folder = copied("onnx")
    content, before = (folder / MANIFEST).read_bytes(), open_bundle(folder).manifest
    for position in range(0, len(content), 11):
        damaged = bytearray(content)
        damaged[position] ^= 1 << bit
        (folder / MANIFEST).write_bytes(damaged)
        with contextlib.suppress(InputError):
            assert open_bundle(folder).manifest == before, position


@pytest.mark.parametrize(("format", "name"), EACH_FILE)
def test_a_bundle_without_one_of_its_files(format, name, copied, refused_bundle):
    folder = copied(format)
    (folder / name).unlink()
    refused_bundle(folder, told=[f"{folder / name} cannot be read", "copy it again"])


def test_a_bundle_of_a_newer_format(copied, refused_bundle):
    folder = copied("onnx")
    manifest = folder / MANIFEST
    document = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(document | {"format_version": 3, "quantisation": "int4"}))
    refused_bundle(folder, told=["bundle format 3", "reads 2", "use the trainkit that made it"])


@pytest.mark.parametrize("content", ["", "null", "[]", "{}", '{"format_version": 2}', '"\\ud800"'])
def test_a_manifest_that_is_not_one(content, copied, refused_bundle):
    folder = copied("onnx")
    (folder / MANIFEST).write_text(content)
    refused_bundle(folder, told=[f"{folder / MANIFEST} is damaged", "export the bundle again"])


def test_a_folder_that_is_no_bundle(refused, tmp_path, tiny_run):
    for folder in (tmp_path, tmp_path / "nowhere", tiny_run):
        for command in ("verify", "inspect"):
            told = [f"{folder} is not a bundle", "trainkit export"]
            refused(command, folder, told=told)


def test_nothing_to_compare_a_bundle_with(refused, tiny_bundles, tmp_path):
    told = [f"{tmp_path} is neither a bundle", "nor a run"]
    refused("verify", tiny_bundles["onnx"], "--against", tmp_path, told=told)


# Where an export may go.


def to_torchscript(run, out, *more):
    return "export", run, "--format", "torchscript", "--out", out, *more


def test_a_target_that_exists_is_kept(refused, tiny_run, copied):
    told = ["exists already", "--force"]
    refused(*to_torchscript(tiny_run, copied("onnx")), told=told)


@pytest.mark.parametrize("made", ["folder", "full folder", "file", "link"])
def test_only_a_bundle_is_replaced(made, refused, tiny_run, tmp_path, copied):
    out = tmp_path / "out"
    if made == "file":
        out.write_text("mine")
    elif made == "link":
        out.symlink_to(copied("onnx"))
    else:
        out.mkdir()
        if made == "full folder":
            (out / "notes.txt").write_text("mine")
    told = [f"{out} is not a bundle", "choose another --out"]
    refused(*to_torchscript(tiny_run, out, "--force"), told=told)


def test_a_bundle_is_replaced_with_force(trainkit, tiny_run, copied, tmp_path):
    out = copied("onnx")
    result = trainkit(*to_torchscript(tiny_run, out, "--force"))
    assert result.exit_code == 0, result.output
    assert open_bundle(out).manifest.format == "torchscript"
    assert not (out / "model.onnx").exists()
    assert list(tmp_path.iterdir()) == [out]


def test_an_export_that_fails_keeps_the_bundle_before(
    trainkit, tree, tiny_run, copied, tmp_path, monkeypatch
):
    out = copied("onnx")
    before = tree(tmp_path)
    monkeypatch.setitem(parity.TOLERANCES, "fp32", parity.Tolerance(absolute=-1, relative=0))
    result = trainkit(*to_torchscript(tiny_run, out, "--force"))
    assert result.exit_code == 1
    assert "FAILED" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: parity failed")
    assert tree(tmp_path) == before


def test_one_format_named_twice_is_one_export(trainkit, copied):
    run = copied("run")
    result = trainkit("export", run, *["--format", "torchscript"] * 2)
    assert result.exit_code == 0, result.output


# The same in a process of its own.


def process(*arguments, **more):
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "trainkit", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=50,
        check=False,
        **more,
    )


def test_a_process_ends_with_2_and_one_sentence(copied, tmp_path):
    change(copied("onnx") / "model.onnx", 99)
    missing = Path("nowhere.csv")
    for arguments, start in [
        (["data", "stats", missing], "nowhere.csv does not exist"),
        (["predict", "onnx", "Who ?"], "onnx/model.onnx is not the file that was exported"),
        (["predict", "nowhere", "Who ?"], "nowhere is neither a bundle"),
    ]:
        result = process(*arguments, cwd=tmp_path)
        assert result.returncode == 2
        assert result.stdout == b""
        (line,) = result.stderr.decode().splitlines()
        assert line.startswith(f"Error: {start}")


def test_a_result_that_cannot_be_written_is_refused_before_the_race(refused, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "bench.json"):
        refused("bench", "run", "nothing-that-exists", "--out", out, told=[str(out), "choose"])
    sentence = refused("bench", "run", "nothing-that-exists", "--out", tmp_path / "new" / "b.json")
    assert "cannot be written" not in sentence

"""A TOML file says what the options say, and a run's own file repeats the run."""

import json
import tomllib

import msgspec
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

from trainkit.cli import cli
from trainkit.data.columns import Columns
from trainkit.data.splits import Splits
from trainkit.serve.errors import InputError
from trainkit.trainer import checkpoint, run_folder
from trainkit.trainer.config import DEFAULTS, TrainConfig
from trainkit.trainer.run import train
from trainkit.trainer.run_config import DataSpec, ModelSpec
from trainkit.trainer.run_folder import CONFIG
from trainkit.trainer.settings import FIELDS, read, resolve, to_toml


@pytest.fixture
def written(tmp_path):
    """Return a function that writes a settings file and returns its path."""

    def write(text):
        path = tmp_path / "settings.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_options_win_over_the_file_and_the_file_over_the_defaults(written):
    file = written('model = "prefix"\nepochs = 4\nlearning_rate = 1\nprefix_length = 8\n')
    spec, config = resolve({"epochs": 2, "backbone": "minilm"}, file)
    assert spec == ModelSpec(kind="prefix", backbone="minilm", prefix_length=8)
    assert config == msgspec.structs.replace(DEFAULTS["prefix"], epochs=2, learning_rate=1.0)
    assert resolve({"model": "simple"}, file)[0].kind == "simple"


def test_every_setting_comes_back(written):
    spec = ModelSpec(
        kind="finetune",
        backbone='a "quoted" \\ path/é\n',
        prefix_length=3,
        max_length=7,
        dropout=0.1 + 0.2,
        min_count=5,
    )
    config = TrainConfig(
        epochs=2, learning_rate=1 / 3, average_decay=0.5, seed=2**32 - 1, device="cpu"
    )
    content = to_toml(spec, config)
    assert resolve({}, written(content)) == (spec, config)
    assert set(tomllib.loads(content.decode())) <= set(FIELDS)


def test_every_setting_has_its_option():
    options = {parameter.name for parameter in cli.commands["train"].params}
    assert set(FIELDS) <= options


def test_the_file_of_a_run_repeats_it(splits, tmp_path):
    few = Splits(splits.train[:80], splits.valid[:40], splits.test[:40])
    spec = ModelSpec(kind="simple", max_length=24, dropout=0.3)
    config = TrainConfig(epochs=2, learning_rate=2e-3, batch_size=16, weight_decay=0.03)
    first = train(spec, few, config, tmp_path / "first").folder
    second = train(*_around(few, resolve({}, first / CONFIG)), tmp_path / "second").folder
    assert _same(first, second)
    other = train(*_around(few, resolve({"seed": 1}, first / CONFIG)), tmp_path / "third").folder
    assert not _same(first, other)


def _around(few, settings):
    spec, config = settings
    return spec, few, config


def _same(first, second):
    weights = [safetensors.torch.load_file(checkpoint.weights_path(run)) for run in (first, second)]
    return all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("learning_rte = 1", ["no setting 'learning_rte'", "did you mean learning_rate?"]),
        ("learning-rate = 1", ["'learning-rate'", "did you mean learning_rate?"]),
        ("colour = 1", ["'colour'", "the settings are model, backbone"]),
        ("[training]\nepochs = 1", ["'training'"]),
        ("epochs = 2.5", ["epochs must be a whole number, not 2.5"]),
        ("epochs = true", ["epochs must be a whole number, not True"]),
        ('learning_rate = "fast"', ["learning_rate must be a number, not 'fast'"]),
        ("dropout = 'no'\nx = 1", ["dropout must be a number, not 'no'", "no setting 'x'"]),
        ("backbone = 1", ["backbone must be a text, not 1"]),
        ("device = 'tpu'", ["device must be one of 'auto', 'cpu', 'cuda', not 'tpu'"]),
        ("model = 'huge'", ["model must be one of 'simple', 'prefix', 'finetune', not 'huge'"]),
        ("epochs = 0", ["epochs must be at least 1, not 0"]),
        ("learning_rate = nan", ["learning_rate must be above 0, not nan"]),
        ("max_length = 0", ["max_length must be at least 1, not 0"]),
        ("backbone = 'minilm'", ["--model simple is trained from scratch"]),
        ("epochs = \n", ["is not TOML", "line 1"]),
        ("epochs = 1\nepochs = 2", ["is not TOML"]),
        ("backbone = 'caf\xe9'".encode("latin-1"), ["is not TOML", "utf-8"]),
    ],
    ids=str,
)
def test_what_is_wrong_in_a_file_is_named(content, told, written):
    file = written(content)
    with pytest.raises(InputError) as caught:
        resolve({"model": "simple"}, file)
    assert str(caught.value).startswith(str(file))
    assert all(part in str(caught.value) for part in told)


def test_a_file_that_is_not_there_and_a_model_that_nobody_names(written, tmp_path):
    with pytest.raises(InputError, match=r"nothing\.toml cannot be read .*--config"):
        resolve({}, tmp_path / "nothing.toml")
    with pytest.raises(InputError, match=r"give --model, or model in .*settings\.toml"):
        resolve({}, written("epochs = 1"))


def test_the_command_takes_the_file_and_keeps_what_it_used(written, tmp_path):
    file = written('model = "simple"\nepochs = 2\nmax_length = 16\n')
    arguments = ["train", "--data", "sample", "--runs", tmp_path / "runs", "--name", "new"]
    arguments += ["--config", file, "--epochs", "1", "--json"]
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["best"]["epoch"] == 1
    kept = tomllib.loads((tmp_path / "runs" / "new" / CONFIG).read_text())
    assert (kept["epochs"], kept["max_length"]) == (1, 16)
    assert kept["weight_decay"] == DEFAULTS["simple"].weight_decay
    file.write_text("epoch = 2\n")
    done = CliRunner().invoke(cli, [*map(str, arguments), "--model", "simple", "--name", "next"])
    assert done.exit_code == 2
    assert "did you mean epochs?" in done.stderr
    assert not (tmp_path / "runs" / "next").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["prefix", "--backbone", "minilm", "--min-count", "5"], "--min-count is of a model from"),
        (["simple", "--prefix-length", "3"], "--prefix-length goes with --model prefix, not sim"),
    ],
)
def test_an_option_without_effect_is_refused(options, told, written):
    arguments = ["train", "--data", "sample", "--model", *options]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 2
    assert told in done.output


@pytest.mark.parametrize("kind", ["simple", "prefix"])
def test_the_file_of_a_run_may_hold_what_has_no_effect(kind, written):
    """All settings stand in it; ``tune`` takes each for given."""
    backbone = "minilm" if kind == "prefix" else None
    content = to_toml(ModelSpec(kind=kind, backbone=backbone), DEFAULTS[kind])
    assert b"prefix_length" in content
    assert b"min_count" in content
    assert resolve(read(written(content)))[0].kind == kind


def test_a_backbones_folder_is_kept_by_its_whole_path(tmp_path, monkeypatch):
    """A run goes on from any working directory; a name of the hub is no folder."""
    (tmp_path / "encoder").mkdir()
    (tmp_path / "minilm").mkdir()
    monkeypatch.chdir(tmp_path)
    for given, kept in (
        ("encoder", str(tmp_path / "encoder")),
        ("minilm", "minilm"),
        ("owner/name", "owner/name"),
    ):
        assert resolve({"model": "finetune", "backbone": given})[0].backbone == kept


def test_a_run_keeps_its_settings_and_data_once(splits, tmp_path):
    few = Splits(splits.train[:80], splits.valid[:40], splits.test[:40])
    spec, config = ModelSpec(kind="simple", max_length=24), TrainConfig(epochs=1, seed=3)
    source = DataSpec(data="/somewhere/q.csv", columns=Columns(text_column="q"))
    folder = train(spec, few, config, tmp_path / "run", source=source).folder
    kept = run_folder.read(folder)
    assert (kept.model, kept.training, kept.source) == (spec, config, source)
    assert kept.data_sha256 == run_folder.fingerprint(few)
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace("seed = 3", "seed = 4"))
    assert read(folder / CONFIG)["seed"] == 4  # for --config it is a file like any other
    with pytest.raises(InputError, match="was changed since the training began"):
        run_folder.read(folder)


def test_a_config_of_something_else_beside_a_bundle_is_not_read(tmp_path):
    """As in a service's folder, which has a config.toml too."""
    (tmp_path / CONFIG).write_text("[server]\nport = 8000\n")
    (tmp_path / "onnx").mkdir()
    run_folder.check_own_test(tmp_path / "onnx", "questions.csv", "test")

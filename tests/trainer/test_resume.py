"""A training that is cut off goes on to the weights, to the bit, of one that was not."""

import errno
import os
import random
import subprocess
import sys
import time

import msgspec
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

from trainkit.cli import cli
from trainkit.data.readers import Example
from trainkit.data.splits import Splits
from trainkit.serve.errors import InputError
from trainkit.trainer import checkpoint, run_folder, state
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.run import train
from trainkit.trainer.run_config import ModelSpec

SIMPLE = ModelSpec(kind="simple", max_length=24)
CONFIG = TrainConfig(epochs=3, batch_size=16, learning_rate=2e-3, average_decay=0.9)
STEPS = 5  # an epoch


class CutOffError(BaseException):
    """Stands for the end of the process: nothing catches it."""


class Cut:
    """Ends the training after ``step`` steps, or at the end of ``epoch``."""

    def __init__(self, step=None, epoch=None):
        self.left, self.last = step, epoch

    def step(self, epoch, done, total, loss, accuracy):
        if self.left is not None:
            self.left -= 1
            if not self.left:
                raise CutOffError

    def epoch(self, result):
        if result.epoch == self.last:
            raise CutOffError


@pytest.fixture(scope="module")
def few(splits):
    return Splits(splits.train[:80], splits.valid[:40], splits.test[:40])


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory):
    """A run that nothing cut off."""
    return train(SIMPLE, few, CONFIG, tmp_path_factory.mktemp("whole") / "run").folder


def weights(folder):
    return safetensors.torch.load_file(checkpoint.weights_path(folder))


def assert_same(folder, other):
    first, second = weights(folder), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("history.json", "valid.json", "test.json"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()
    kept, expected = (checkpoint.load(run).checkpoint for run in (folder, other))
    assert kept.temperature == expected.temperature
    assert not list(folder.glob("state*"))


def begun(few, folder, cut, spec=SIMPLE, config=CONFIG):
    with pytest.raises(CutOffError):
        train(spec, few, config, folder, cut, save_every_s=0)


@pytest.mark.parametrize(
    "cut", [{"step": 1}, {"step": 3}, {"step": STEPS}, {"step": STEPS + 2}, {"epoch": 2}]
)
def test_it_comes_to_the_same_weights(few, whole, tmp_path, cut):
    folder = tmp_path / "run"
    begun(few, folder, Cut(**cut)) if cut != {"step": 1} else _begun_early(few, folder)
    torch.manual_seed(123)  # another process has other random numbers
    assert_same(train(SIMPLE, few, CONFIG, folder, resume=True).folder, whole)


def _begun_early(few, folder):
    """Cut off before the first state: only the settings are there."""
    folder.mkdir()
    settings = {"model": SIMPLE, "training": CONFIG}
    data_sha256 = run_folder.fingerprint(few)
    run_folder.write(folder, run_folder.RunConfig(**settings, data_sha256=data_sha256))


def test_it_may_be_cut_off_again_and_again(few, whole, tmp_path):
    folder = tmp_path / "run"
    begun(few, folder, Cut(step=2))
    for steps in (3, 1, 4, 2):
        with pytest.raises(CutOffError):
            train(SIMPLE, few, CONFIG, folder, Cut(step=steps), resume=True, save_every_s=0)
    assert_same(train(SIMPLE, few, CONFIG, folder, resume=True).folder, whole)


def test_patience_ends_it_where_it_would_have_ended(few, tmp_path):
    config = TrainConfig(epochs=20, learning_rate=1e-9, head_learning_rate=1e-9, patience_epochs=2)
    whole = train(SIMPLE, few, config, tmp_path / "whole")
    last = whole.trained.history[-1].epoch
    assert last < 20
    begun(few, tmp_path / "run", Cut(epoch=last), config=config)
    assert_same(train(SIMPLE, few, config, tmp_path / "run", resume=True).folder, whole.folder)


def test_cut_off_after_the_training_it_only_scores_again(few, whole, tmp_path, monkeypatch):
    def cut_off(*args):
        raise CutOffError

    monkeypatch.setattr("trainkit.trainer.run.fit_temperature", cut_off)
    begun(few, tmp_path / "run", Cut())
    monkeypatch.undo()
    no_step = Cut(step=1)
    assert_same(train(SIMPLE, few, CONFIG, tmp_path / "run", no_step, resume=True).folder, whole)


def test_a_state_that_lost_the_optimizer_is_noticed(few, whole, tmp_path, monkeypatch):
    """The comparison of weights is able to fail."""
    begun(few, tmp_path / "run", Cut(step=7))
    monkeypatch.setattr(state, "OPTIMIZER", "nothing.")
    run = train(SIMPLE, few, CONFIG, tmp_path / "run", resume=True)
    with pytest.raises(AssertionError):
        assert_same(run.folder, whole)


def test_other_data_or_settings_are_refused_and_nothing_changes(few, tmp_path, tree):
    folder = tmp_path / "run"
    begun(few, folder, Cut(step=7))
    before = tree(folder)
    other = Splits((*few.train[:-1], Example("Who?", few.train[-1].label)), few.valid, few.test)
    with pytest.raises(InputError, match=r"not what .* was trained on"):
        train(SIMPLE, other, CONFIG, folder, resume=True)
    warmer = msgspec.structs.replace(CONFIG, learning_rate=1e-3)
    with pytest.raises(InputError, match=r"learning_rate was 0\.002 and is 0\.001"):
        train(SIMPLE, few, warmer, folder, resume=True)
    with pytest.raises(InputError, match="exists already"):
        train(SIMPLE, few, CONFIG, folder)
    assert tree(folder) == before


def test_a_finished_run_and_another_folder_are_refused(few, whole, tmp_path):
    with pytest.raises(InputError, match="is finished"):
        train(SIMPLE, few, CONFIG, whole, resume=True)
    with pytest.raises(InputError, match="is not a run"):
        train(SIMPLE, few, CONFIG, tmp_path, resume=True)


@pytest.mark.parametrize("damage", ["end", "header", "tensors", "settings"])
def test_what_was_damaged_is_refused(few, tmp_path, damage):
    folder = tmp_path / "run"
    begun(few, folder, Cut(step=7))
    file = folder / ("config.toml" if damage == "settings" else state.STATE)
    content = file.read_bytes()
    damaged = {
        "end": content[:-8],
        "header": content.replace(b'\\"done\\":', b'\\"done\\":1', 1)[:-1],
        "tensors": content[:-1] + bytes([content[-1] ^ 1]),
        "settings": content.replace(b"16", b"17", 1),
    }[damage]
    assert damaged != content
    file.write_bytes(damaged)
    with pytest.raises(InputError, match=r"damaged|was changed"):
        train(SIMPLE, few, CONFIG, folder, resume=True)


def test_a_full_disk_is_said_and_the_last_state_is_kept(few, whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    write, count = state.write_atomically, []

    def full(path, content):
        count.append(path)
        if len(count) > 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(state, "write_atomically", full)
    with pytest.raises(InputError, match=r"No space left on device.*--resume"):
        train(SIMPLE, few, CONFIG, folder, save_every_s=0)
    monkeypatch.undo()
    assert not list(folder.glob(".*"))  # nothing by half
    assert_same(train(SIMPLE, few, CONFIG, folder, resume=True).folder, whole)


@pytest.mark.long
def test_a_command_that_is_killed_again_and_again_comes_to_its_end(tmp_path):
    """kill -9 at random moments, wherever the process then is."""
    train = [sys.executable, "-m", "trainkit", "train", "--runs", str(tmp_path)]
    train += ["--data", "sample", "--model", "simple", "--epochs", "6", "--max-length", "24"]
    train += ["--device", "cpu"]
    subprocess.run([*train, "--name", "whole"], check=True, capture_output=True)
    folder, rng, kills = tmp_path / "run", random.Random(0), 0
    command = [*train, "--name", "run", "--save-every", "0"]
    while not (folder / "test.json").exists():
        log = (tmp_path / "log").open("wb")
        with log, subprocess.Popen(command, stdout=log, stderr=log) as process:
            _wait_for_progress(folder, process)
            time.sleep(rng.uniform(0, 0.2))
            if kills < 4:
                process.kill()
                kills += process.wait() != 0
            else:
                assert process.wait() == 0, (tmp_path / "log").read_text()
        command = [sys.executable, "-m", "trainkit", "train", "--resume", str(folder)]
        command += ["--save-every", "0"]
    assert kills >= 3
    assert_same(folder, tmp_path / "whole")


def _wait_for_progress(folder, process):
    """Wait until it has saved a state that was not there."""
    before = _saved_at(folder)
    while process.poll() is None:
        if _saved_at(folder) != before:
            return
        time.sleep(0.01)


def _saved_at(folder):
    file = folder / state.STATE
    return file.stat().st_mtime_ns if file.exists() else None


@pytest.mark.parametrize("number", [1, 2])
def test_ctrl_c_while_the_best_weights_are_replaced_mixes_no_epochs(
    few, whole, tmp_path, monkeypatch, number
):
    """The weights are of an epoch that the history does not have yet."""
    folder, saved = tmp_path / "run", []
    save = checkpoint.save

    def interrupted(*arguments, **named):
        save(*arguments, **named)
        saved.append(named["epoch"])
        if len(saved) == number:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(SIMPLE, few, CONFIG, folder, save_every_s=0)
    train(SIMPLE, few, CONFIG, folder, resume=True)
    assert_same(folder, whole)


def test_the_command_takes_no_settings_beside_resume(few, tmp_path):
    folder = tmp_path / "run"
    begun(few, folder, Cut(step=7))
    for arguments, told in (
        (["--resume", folder, "--epochs", "5"], "--epochs cannot be given with --resume"),
        (["--resume", folder, "--data", "sample"], "--data cannot be given with --resume"),
        (["--resume", folder], "was trained on data in memory"),
        (["--model", "simple"], "--data and --model are needed"),
    ):
        done = CliRunner().invoke(cli, ["train", *map(str, arguments)])
        assert done.exit_code == 2
        assert told in done.stderr

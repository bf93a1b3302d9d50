"""A search is resumable, may be shared by processes, and never sees the test set."""

import sqlite3
import subprocess
import sys

import optuna
import pytest
from click.testing import CliRunner

from trainkit.cli import cli
from trainkit.data.readers import Example
from trainkit.data.splits import Splits
from trainkit.serve.errors import InputError
from trainkit.trainer import tuning
from trainkit.trainer.callbacks import Epoch
from trainkit.trainer.run import train
from trainkit.trainer.settings import resolve
from trainkit.trainer.train_step import DivergedError
from trainkit.trainer.tuning import tune

FIXED = {"model": "simple", "max_length": 16, "epochs": 1, "batch_size": 32}


class Unread(tuple):
    """A test set that nobody may read."""

    def __iter__(self):
        raise AssertionError("the test set was read")

    __len__ = __getitem__ = __iter__


@pytest.fixture(scope="module")
def few(splits):
    return Splits(splits.train[:60], splits.valid[:40], Unread())


@pytest.fixture
def invented(monkeypatch):
    """Accuracies by formula instead of a training: 1 where the rate is 1e-3."""

    def accuracy(settings, splits, watch):
        away = abs(settings["learning_rate"] / 1e-3 - 1)
        return 1 / (1 + away)

    monkeypatch.setattr(tuning, "_accuracy", accuracy)


def trials_of(file):
    study = optuna.load_study(study_name=tuning.NAME, storage=f"sqlite:///{file}")
    found = study.trials
    study._storage.remove_session()
    return found


def test_it_goes_on_and_its_best_settings_give_that_accuracy(few, splits, tmp_path):
    file = tmp_path / "studies" / "tune.db"
    first = tune(FIXED, few, file, trials=2)
    assert first.finished == len(trials_of(file)) == 2
    found = tune(FIXED, few, file, trials=3)
    values = [trial.value for trial in trials_of(file)]
    assert len(values) == 3
    assert found.valid_accuracy == max(values)
    spec, config = resolve({}, found.config)
    assert config.learning_rate == trials_of(file)[found.trial].params["learning_rate"]
    scored = Splits(few.train, few.valid, splits.test[:20])
    run = train(spec, scored, config, tmp_path / "run")
    assert run.trained.best.valid_accuracy == found.valid_accuracy
    assert {path.name for path in file.parent.iterdir()} == {"tune.db", "tune.toml"}


@pytest.mark.slow
def test_a_study_in_two_parts_is_the_study_in_one(few, tmp_path, invented):
    for parts, name in (((14,), "whole"), ((3, 14), "parts")):
        for trials in parts:
            tune(FIXED, few, tmp_path / f"{name}.db", trials=trials)
    whole, parts = (trials_of(tmp_path / f"{name}.db") for name in ("whole", "parts"))
    assert [trial.params for trial in whole] == [trial.params for trial in parts]
    assert len({trial.params["learning_rate"] for trial in whole}) == 14


def test_what_is_given_is_fixed(few, tmp_path, invented):
    fixed = {**FIXED, "learning_rate": 0.002, "weight_decay": 0.0}
    found = tune(fixed, few, tmp_path / "tune.db", trials=1)
    assert not set(found.searched) & set(fixed)
    assert resolve({}, found.config)[1].learning_rate == 0.002
    everything = {**FIXED, **found.searched, **fixed}
    with pytest.raises(InputError, match="nothing is left to choose"):
        tune(everything, few, tmp_path / "other.db", trials=1)


@pytest.mark.slow
@pytest.mark.parametrize("pruner", ["median", "halving", "none"])
def test_a_hopeless_trial_ends_early(few, tmp_path, monkeypatch, pruner):
    ended = []

    def accuracy(settings, splits, watch):
        good = 0.9 if watch.trial.number < 6 else 0.2
        for epoch in range(1, 9):
            ended.append((watch.trial.number, epoch))
            watch.epoch(Epoch(epoch, 1.0, good, 1.0, good, False))
        return good

    monkeypatch.setattr(tuning, "_accuracy", accuracy)
    tune(FIXED, few, tmp_path / "tune.db", trials=8, pruner=pruner)
    states = [trial.state.name for trial in trials_of(tmp_path / "tune.db")]
    last = max(epoch for number, epoch in ended if number == 7)
    assert states[7] == ("COMPLETE" if pruner == "none" else "PRUNED")
    assert last == 8 if pruner == "none" else 2 <= last < 8  # none by its first epoch


def test_a_loss_that_is_no_number_ends_one_trial(few, tmp_path, monkeypatch):
    def accuracy(settings, splits, watch):
        if watch.trial.number == 0:
            raise DivergedError("the loss became nan")
        return 0.5

    monkeypatch.setattr(tuning, "_accuracy", accuracy)
    lines = []
    file = tmp_path / "tune.db"
    with pytest.raises(InputError, match=r"no trial of .* came to its end"):
        tune(FIXED, few, file, trials=1, on_progress=lines.append)
    assert tune(FIXED, few, file, trials=2, on_progress=lines.append).trial == 1
    assert "the loss became nan" in lines[0]
    assert "val acc 50.0%" in lines[1]


def test_an_interrupt_is_no_trial(few, tmp_path, monkeypatch):
    def accuracy(settings, splits, watch):
        if watch.trial.number == 1:
            raise KeyboardInterrupt
        return 0.5

    monkeypatch.setattr(tuning, "_accuracy", accuracy)
    with pytest.raises(KeyboardInterrupt):
        tune(FIXED, few, tmp_path / "tune.db", trials=3)
    assert tune(FIXED, few, tmp_path / "tune.db", trials=3).finished == 3


def _garbage(file):
    file.write_bytes(b"not a database at all, " * 100)


def _empty(file):
    file.touch()


def _other_tables(file):
    with sqlite3.connect(file) as database:
        database.execute("CREATE TABLE recipes (name TEXT)")
    database.close()


def _other_study(file):
    study = optuna.create_study(study_name="theirs", storage=f"sqlite:///{file}")
    study._storage.remove_session()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (_garbage, "is not an SQLite file"),
        (_empty, "is not an Optuna study"),
        (_other_tables, "is not an Optuna study"),
        (_other_study, "holds no study of this trainkit"),
    ],
)
def test_a_file_that_is_no_study_is_left_as_it_is(make, told, few, tmp_path, tree):
    file = tmp_path / "tune.db"
    make(file)
    before = tree(tmp_path)
    with pytest.raises(InputError, match=told):
        tune(FIXED, few, file, trials=1)
    assert tree(tmp_path) == before


def test_a_study_of_another_search_is_left_as_it_is(few, tmp_path, tree, invented):
    file = tmp_path / "tune.db"
    tune(FIXED, few, file, trials=1)
    before = tree(tmp_path)
    other = Splits((Example("Who?", few.train[0].label), *few.train[1:]), few.valid, few.test)
    for fixed, splits, told in (
        (FIXED, other, "its data was other data"),
        ({**FIXED, "model": "prefix"}, few, "model was simple and is prefix"),
        ({**FIXED, "seed": 3}, few, "seed was not given and is 3"),
    ):
        with pytest.raises(InputError, match=rf"study of another search \({told}"):
            tune(fixed, splits, file, trials=2)
    file.rename(tmp_path / "moved.db")
    with pytest.raises(InputError, match="exists already, without its study"):
        tune(FIXED, few, file, trials=2)
    with pytest.raises(InputError, match="another suffix"):
        tune(FIXED, few, tmp_path / "new.toml", trials=2)
    (tmp_path / "moved.db").rename(file)
    assert tree(tmp_path) == before


def test_the_command_says_what_is_wrong(tmp_path):
    file = tmp_path / "tune.db"
    _garbage(file)
    arguments = ["tune", "--data", "sample", "--study", str(file)]
    for more, told in (
        (["--model", "simple"], "is not an SQLite file"),
        ([], "no kind of model is named"),
        (["--model", "simple", "--epochs", "0"], "--epochs must be at least 1"),
    ):
        done = CliRunner().invoke(cli, [*arguments, *more])
        assert done.exit_code == 2
        assert told in done.stderr


@pytest.mark.slow
def test_two_processes_share_one_study(tmp_path):
    """Both begin at once, from nothing."""
    command = [sys.executable, "-W", "error", "-m", "trainkit", "tune", "--data", "sample"]
    command += ["--model", "simple", "--epochs", "1", "--max-length", "8", "--device", "cpu"]
    command += ["--study", str(tmp_path / "tune.db"), "--trials", "6"]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outcomes = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0, 0], outcomes
    found = trials_of(tmp_path / "tune.db")
    assert len(found) in (6, 7)
    assert all(trial.state.name in ("COMPLETE", "PRUNED") for trial in found)
    assert len({trial.params["learning_rate"] for trial in found}) == len(found)
    lines = [err.count("Trial ") for _, err in outcomes]
    assert sum(lines) == len(found)
    assert min(lines) >= 1  # each took its part
    assert {path.name for path in tmp_path.iterdir()} == {"tune.db", "tune.toml"}

"""TensorBoard's own reader finds in the event files what the run's files say."""

import json
import sys

import msgspec
import pytest
from click.testing import CliRunner

from trainkit.cli import cli
from trainkit.data.splits import Splits
from trainkit.trainer.callbacks import NoCallback
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.event_files import EventFiles
from trainkit.trainer.run import train
from trainkit.trainer.run_config import ModelSpec

SIMPLE = ModelSpec(kind="simple", max_length=16)
CONFIG = TrainConfig(epochs=3, batch_size=16, learning_rate=2e-3)
STEPS = 5  # an epoch


@pytest.fixture
def few(splits):
    return Splits(splits.train[:80], splits.valid[:40], splits.test[:40])


@pytest.fixture
def scalars():
    """Return a function from a run's folder to every tag's values by step."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(folder, name="events"):
        found = EventAccumulator(str(folder / name))
        found.Reload()
        tags = found.Tags()["scalars"]
        return {tag: {one.step: one.value for one in found.Scalars(tag)} for tag in tags}

    return read


class Cut(NoCallback):
    """Ends the training after so many steps, as ``how`` says."""

    def __init__(self, after, how):
        self.left, self.how = after, how

    def step(self, epoch, done, total, loss, accuracy):
        self.left -= 1
        if not self.left:
            raise self.how


def test_it_holds_every_step_and_every_epoch(few, tmp_path, scalars):
    folder = tmp_path / "run"
    with EventFiles(folder, NoCallback()) as progress:
        train(SIMPLE, few, CONFIG, folder, progress)
    found = scalars(folder)
    assert set(found["step/loss"]) == set(found["step/accuracy"]) == set(range(1, 3 * STEPS + 1))
    for epoch in json.loads((folder / "history.json").read_text()):
        for split in ("train", "valid"):
            for name in ("loss", "accuracy"):
                value = found[f"{name}/{split}"][epoch["epoch"]]
                assert value == pytest.approx(epoch[f"{split}_{name}"], rel=1e-6)
        assert found["step/loss"][STEPS * epoch["epoch"]] == pytest.approx(epoch["train_loss"])


def test_a_training_that_goes_on_leaves_one_curve(few, tmp_path, scalars):
    folder = tmp_path / "run"
    with pytest.raises(SystemExit), EventFiles(folder, Cut(8, SystemExit)) as progress:
        train(SIMPLE, few, CONFIG, folder, progress, save_every_s=1e9)
    with EventFiles(folder, NoCallback()) as progress:
        train(SIMPLE, few, CONFIG, folder, progress, resume=True)
    assert set(scalars(folder)["step/loss"]) == set(range(1, 3 * STEPS + 1))
    assert set(scalars(folder)["loss/valid"]) == {1, 2, 3}


def test_ctrl_c_in_the_first_epoch_leaves_no_folder(few, tmp_path, scalars):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), EventFiles(folder, Cut(2, KeyboardInterrupt)) as told:
        train(SIMPLE, few, CONFIG, folder, told)
    assert list(tmp_path.iterdir()) == []


COMMAND = ["train", "--data", "sample", "--model", "simple", "--epochs", "1", "--tensorboard"]


def test_the_command_writes_them_into_the_run(tmp_path, scalars):
    done = CliRunner().invoke(cli, [*COMMAND, "--runs", str(tmp_path), "--name", "run"])
    assert done.exit_code == 0, done.output
    assert set(scalars(tmp_path / "run")["accuracy/valid"]) == {1}
    assert "Epoch 001" in done.stderr  # who else is told, still is


def test_without_tensorboard_the_remedy_is_said_and_nothing_is_trained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    done = CliRunner().invoke(cli, [*COMMAND, "--runs", str(tmp_path)])
    assert done.exit_code == 2
    assert "run: pip install 'trainkit-onnx[tensorboard]'" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_refit_that_goes_on_leaves_the_curves_before_it(few, tmp_path, scalars):
    folder = tmp_path / "run"
    refit = msgspec.structs.replace(CONFIG, refit=True)
    with pytest.raises(SystemExit), EventFiles(folder, Cut(3 * STEPS + 8, SystemExit)) as told:
        train(SIMPLE, few, refit, folder, told, save_every_s=0)
    with EventFiles(folder, NoCallback()) as told:
        train(SIMPLE, few, refit, folder, told, resume=True)
    assert set(scalars(folder)["step/loss"]) == set(range(1, 3 * STEPS + 1))
    assert set(scalars(folder)["loss/valid"]) == {1, 2, 3}
    steps = max(scalars(folder / "events", "refit")["refit/step/loss"])
    assert set(scalars(folder / "events", "refit")["refit/step/loss"]) == set(range(1, steps + 1))

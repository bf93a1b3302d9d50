"""The model that is kept may be trained on validation too."""

import msgspec
import pytest
import safetensors.torch
import torch

from trainkit.data.splits import Splits
from trainkit.trainer import checkpoint, state
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.metrics import Evaluation, evaluate
from trainkit.trainer.run import VALIDATED, VALIDATION, ModelChoice, start

SIMPLE = ModelChoice(kind="simple", max_length=24)
PLAIN = TrainConfig(epochs=3, batch_size=16, learning_rate=2e-3, average_decay=0.9)
REFIT = msgspec.structs.replace(PLAIN, refit=True)


class CutOffError(BaseException):
    """Stands for the end of the process: nothing catches it."""


class Cut:
    """Progress that ends the training after ``step`` steps, and knows whether it is the refit."""

    def __init__(self, step):
        self.left, self.refitted = step, False

    def step(self, epoch, done, total, loss, accuracy):
        self.left -= 1
        if not self.left:
            raise CutOffError

    def epoch(self, result):
        assert (result.valid_accuracy is None) == self.refitted

    def refit(self):
        self.refitted = True


@pytest.fixture(scope="module")
def few(splits):
    return Splits(splits.train[:80], splits.valid[:40], splits.test[:40])


@pytest.fixture(scope="module")
def refitted(few, tmp_path_factory):
    return start(SIMPLE, few, REFIT, tmp_path_factory.mktemp("refitted") / "run", report=True)


def weights(folder):
    return safetensors.torch.load_file(checkpoint.weights_path(folder))


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_validation_chooses_by_a_model_that_has_not_seen_it(few, refitted, tmp_path):
    plain = start(SIMPLE, few, PLAIN, tmp_path / "plain")
    assert_equal(weights(refitted.folder / VALIDATED), weights(plain.folder))
    assert refitted.trained.history == plain.trained.history
    assert refitted.valid == plain.valid
    kept = msgspec.json.decode((refitted.folder / VALIDATION).read_bytes(), type=Evaluation)
    assert kept == plain.valid
    first, second = (checkpoint.load(run.folder).checkpoint for run in (refitted, plain))
    assert (first.epoch, first.metrics, first.temperature) == (
        second.epoch,
        second.metrics,
        second.temperature,
    )
    assert refitted.test != plain.test


def test_what_is_kept_is_trained_on_both(few, refitted, tmp_path):
    """The reference is a run on these texts whose last epoch is its best."""
    for count in range(len(few.test), 0, -1):  # texts that do not choose change nothing else
        both = Splits(few.train + few.valid, few.test[:count], few.test)
        reference = start(SIMPLE, both, PLAIN, tmp_path / f"reference-{count}")
        if reference.trained.best.epoch == PLAIN.epochs:
            break
    assert reference.trained.best.epoch == PLAIN.epochs
    loaded = checkpoint.load(refitted.folder)
    assert_equal(weights(refitted.folder), weights(reference.folder))
    scores = evaluate(
        loaded.classifier().logits([example.text for example in few.test]),
        [example.label for example in few.test],
        loaded.checkpoint.model.labels,
        loaded.checkpoint.temperature,
    )
    assert scores == refitted.test


def test_where_the_first_was_stopped_early_it_is_trained_up_to_the_best_epoch(few, tmp_path):
    never_better = {"learning_rate": 1e-9, "head_learning_rate": 1e-9, "average_decay": 0.0}
    config = msgspec.structs.replace(REFIT, epochs=9, patience_epochs=2, **never_better)
    run = start(SIMPLE, few, config, tmp_path / "run")
    assert len(run.trained.history) < config.epochs
    assert checkpoint.load(run.folder).checkpoint.epoch == run.trained.best.epoch


@pytest.mark.parametrize("steps", [3, 7, 17, 20, 23])
def test_cut_off_in_either_training_it_comes_to_the_same(few, refitted, tmp_path, steps):
    folder, cut = tmp_path / "run", Cut(steps)
    with pytest.raises(CutOffError):
        start(SIMPLE, few, REFIT, folder, cut, save_every_s=0)
    assert cut.refitted == (steps > 3 * 5)
    torch.manual_seed(123)  # another process has other random numbers
    resumed = start(SIMPLE, few, REFIT, folder, resume=True)
    assert_equal(weights(folder), weights(refitted.folder))
    assert (resumed.valid, resumed.test) == (refitted.valid, refitted.test)
    assert not list(folder.rglob(f"{state.STATE}*"))


def test_ctrl_c_keeps_the_state_and_no_model_that_was_not_refitted(few, refitted, tmp_path):
    class Interrupt(Cut):
        def step(self, *now):
            try:
                super().step(*now)
            except CutOffError:
                raise KeyboardInterrupt from None

    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        start(SIMPLE, few, REFIT, folder, Interrupt(8), save_every_s=0)
    assert not (folder / checkpoint.CHECKPOINT).exists()
    start(SIMPLE, few, REFIT, folder, resume=True)
    assert_equal(weights(folder), weights(refitted.folder))

"""The model that is kept may be trained on validation too."""

import msgspec
import pytest
import safetensors.torch
import torch

from trainkit.data.splits import Splits
from trainkit.trainer import checkpoint, state
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.loop import fit
from trainkit.trainer.metrics import Evaluation, evaluate
from trainkit.trainer.new_model import make_model
from trainkit.trainer.run import VALIDATED, VALIDATION, train
from trainkit.trainer.run_config import ModelSpec

SIMPLE = ModelSpec(kind="simple", max_length=24)
PLAIN = TrainConfig(epochs=3, batch_size=16, learning_rate=2e-3, average_decay=0.9)
REFIT = msgspec.structs.replace(PLAIN, refit=True)


class CutOffError(BaseException):
    """Stands for the end of the process: nothing catches it."""


class Cut:
    """Ends the training after ``step`` steps, and knows whether it is the refit."""

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
    return train(SIMPLE, few, REFIT, tmp_path_factory.mktemp("refitted") / "run", report=True)


def weights(folder):
    return safetensors.torch.load_file(checkpoint.weights_path(folder))


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def to_the_end(splits, folder):
    """The reference: one training through its whole schedule, whatever validation says."""
    folder.mkdir()
    torch.manual_seed(PLAIN.seed)
    fit(make_model(SIMPLE, splits, PLAIN), splits, PLAIN, folder, until=PLAIN.epochs)
    return checkpoint.load(folder)


def assert_scored(scores, loaded, examples, temperature):
    found = evaluate(
        loaded.classifier().logits([example.text for example in examples]),
        [example.label for example in examples],
        loaded.checkpoint.model.labels,
        temperature,
    )
    assert found == scores


def test_validation_scores_a_model_that_has_not_seen_it_and_went_as_far(few, refitted, tmp_path):
    reference = to_the_end(few, tmp_path / "reference")
    assert_equal(weights(refitted.folder / VALIDATED), weights(tmp_path / "reference"))
    kept = checkpoint.load(refitted.folder).checkpoint
    assert kept.epoch == refitted.trained.best.epoch == PLAIN.epochs
    assert_scored(refitted.valid, reference, few.valid, kept.temperature)
    written = msgspec.json.decode((refitted.folder / VALIDATION).read_bytes(), type=Evaluation)
    assert written == refitted.valid
    assert kept.metrics["valid_loss"] == refitted.trained.history[-1].valid_loss


def test_its_epoch_is_not_the_one_that_validation_prefers(few, tmp_path):
    # A rate that ruins the model late.
    config = TrainConfig(epochs=6, learning_rate=3e-2, head_learning_rate=3e-2, warmup_share=0.9)
    plain = train(SIMPLE, few, config, tmp_path / "plain")
    config = msgspec.structs.replace(config, refit=True)
    refitted = train(SIMPLE, few, config, tmp_path / "refitted")
    assert plain.trained.best.epoch < refitted.trained.best.epoch == config.epochs


def test_what_is_kept_is_trained_on_both(few, refitted, tmp_path):
    both = Splits(few.train + few.valid, (), few.test)
    reference = to_the_end(both, tmp_path / "reference")
    loaded = checkpoint.load(refitted.folder)
    assert_equal(weights(refitted.folder), weights(tmp_path / "reference"))
    assert_scored(refitted.test, reference, few.test, loaded.checkpoint.temperature)


def test_where_the_first_was_stopped_early_it_is_trained_up_to_the_best_epoch(few, tmp_path):
    never_better = {"learning_rate": 1e-9, "head_learning_rate": 1e-9, "average_decay": 0.0}
    config = msgspec.structs.replace(REFIT, epochs=9, patience_epochs=2, **never_better)
    run = train(SIMPLE, few, config, tmp_path / "run")
    assert len(run.trained.history) < config.epochs
    assert checkpoint.load(run.folder).checkpoint.epoch == run.trained.best.epoch


@pytest.mark.slow
@pytest.mark.parametrize("steps", [3, 7, 17, 20, 23])
def test_cut_off_in_either_training_it_comes_to_the_same(few, refitted, tmp_path, steps):
    folder, cut = tmp_path / "run", Cut(steps)
    with pytest.raises(CutOffError):
        train(SIMPLE, few, REFIT, folder, cut, save_every_s=0)
    assert cut.refitted == (steps > 3 * 5)
    torch.manual_seed(123)  # another process has other random numbers
    resumed = train(SIMPLE, few, REFIT, folder, resume=True)
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
        train(SIMPLE, few, REFIT, folder, Interrupt(8), save_every_s=0)
    assert not (folder / checkpoint.CHECKPOINT).exists()
    train(SIMPLE, few, REFIT, folder, resume=True)
    assert_equal(weights(folder), weights(refitted.folder))

"""The training loop on real questions: repeatable, stopping early, its best epoch loaded."""

import itertools
import json

import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn import metrics as sklearn_metrics

from trainkit.data.splits import Splits
from trainkit.serve.errors import InputError
from trainkit.trainer import checkpoint, run_folder
from trainkit.trainer.batches import encode, shuffled
from trainkit.trainer.config import DEFAULTS, TrainConfig
from trainkit.trainer.loop import fit, score
from trainkit.trainer.metrics import evaluate
from trainkit.trainer.new_model import make_model
from trainkit.trainer.run import train
from trainkit.trainer.run_config import ModelSpec
from trainkit.trainer.setup import make_optimizer, make_schedule


class Quiet:
    """TrainingCallback that keeps what it is told; ``interrupt_at`` presses Ctrl-C at that step."""

    def __init__(self, interrupt_at=None):
        self.epochs, self.steps, self.interrupt_at = [], 0, interrupt_at

    def step(self, epoch, done, total, loss, accuracy):
        self.steps += 1
        if self.steps == self.interrupt_at:
            raise KeyboardInterrupt

    def epoch(self, result):
        self.epochs.append(result)


@pytest.fixture
def few(splits):
    return Splits(splits.train[:160], splits.valid[:60], splits.test[:60])


SIMPLE = ModelSpec(kind="simple")
SHORT = TrainConfig(epochs=3, learning_rate=2e-3)


def test_one_seed_gives_the_same_weights_to_the_bit(few, tmp_path):
    runs = [train(SIMPLE, few, SHORT, tmp_path / name, Quiet()) for name in "ab"]
    first, second = (safetensors.torch.load_file(checkpoint.weights_path(r.folder)) for r in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = train(SIMPLE, few, msgspec.structs.replace(SHORT, seed=1), tmp_path / "c", Quiet())
    third = safetensors.torch.load_file(checkpoint.weights_path(other.folder))
    assert not torch.equal(first["head.weight"], third["head.weight"])


def test_the_best_epoch_is_the_one_that_is_saved_and_loaded(few, tmp_path):
    """A rate that ruins the model late: the last weights are not the best ones."""
    config = TrainConfig(epochs=6, learning_rate=3e-2, head_learning_rate=3e-2, warmup_share=0.9)
    run = train(SIMPLE, few, config, tmp_path / "run", Quiet())
    history, best = run.trained.history, run.trained.best
    assert best.valid_accuracy == max(epoch.valid_accuracy for epoch in history)
    assert best.epoch < len(history)
    assert checkpoint.load(run.folder).checkpoint.epoch == best.epoch
    loaded = checkpoint.load(run.folder)
    data = encode(few.valid, loaded.encoder, loaded.checkpoint.model.labels)
    for model in (run.trained.model, loaded.model):
        loss, accuracy = score(model, data)
        assert accuracy == best.valid_accuracy
        assert loss == pytest.approx(best.valid_loss, rel=1e-5)
    assert len(list(run.folder.glob("weights-*"))) == 1


def test_training_stops_when_nothing_gets_better(few, tmp_path):
    config = TrainConfig(epochs=30, learning_rate=1e-9, head_learning_rate=1e-9, patience_epochs=2)
    run = train(SIMPLE, few, config, tmp_path / "run", Quiet())
    assert len(run.trained.history) < 30
    assert len(run.trained.history) - run.trained.best.epoch == 2


def test_ctrl_c_keeps_the_best_checkpoint(few, tmp_path):
    steps_an_epoch = 5
    run = train(SIMPLE, few, SHORT, tmp_path / "run", Quiet(interrupt_at=2 * steps_an_epoch + 2))
    assert run.trained.interrupted
    assert len(run.trained.history) == 2
    assert checkpoint.load(run.folder).checkpoint.epoch == run.trained.best.epoch


def test_ctrl_c_in_the_first_epoch_leaves_no_folder(few, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(SIMPLE, few, SHORT, tmp_path / "run", Quiet(interrupt_at=2))
    assert list(tmp_path.iterdir()) == []


def test_the_run_folder_holds_settings_history_and_test_score(few, tmp_path):
    quiet = Quiet()
    run = train(SIMPLE, few, SHORT, tmp_path / "run", quiet)
    assert (tmp_path / "latest").resolve() == run.folder
    assert len(json.loads((run.folder / "history.json").read_text())) == 3
    assert json.loads((run.folder / "test.json").read_text())["count"] == 60
    assert run_folder.read(run.folder).training == SHORT
    assert str(quiet.epochs[2]).startswith("Epoch 003 | train loss ")
    assert " | train acc " in str(quiet.epochs[2])
    assert str(quiet.epochs[2]).endswith("%")


def test_a_loss_that_is_no_number_ends_with_the_remedy(few, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        return torch.tensor(float("nan"), requires_grad=True)

    monkeypatch.setattr("trainkit.trainer.loop.F.cross_entropy", broken)
    with pytest.raises(InputError, match="lower --learning-rate"):
        train(SIMPLE, few, SHORT, tmp_path / "run", Quiet())
    assert not (tmp_path / "run").exists()


def test_an_epoch_has_every_example_once_in_an_order_of_its_own(few):
    new = make_model(SIMPLE, few)
    data = encode(few.train, new.encoder, new.model.config.labels)
    epochs = [list(shuffled(data, 32, 0, epoch, 4096)) for epoch in (1, 2)]
    assert [[share.parts[0].ids.shape[0] for share in epoch] for epoch in epochs] == [[32] * 5] * 2
    orders = [torch.cat([share.parts[0].labels for share in epoch]).tolist() for epoch in epochs]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(data.labels.tolist())


def test_the_rate_warms_up_and_falls_to_zero(few):
    new = make_model(SIMPLE, few)
    config = TrainConfig(warmup_share=0.2, learning_rate=1.0, head_learning_rate=0.5)
    optimizer = make_optimizer(new.model, config)
    schedule = make_schedule(optimizer, config, 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    peak = max(group["initial_lr"] for group in optimizer.param_groups)
    assert rates[0] == pytest.approx(peak / 20)
    assert max(rates) == pytest.approx(peak)
    assert rates.index(max(rates)) in (19, 20)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[21:]))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_biases_norms_and_prefixes_are_not_decayed(few):
    new = make_model(ModelSpec(kind="prefix"), few)
    optimizer = make_optimizer(new.model, DEFAULTS["prefix"])
    names = {id(weight): name for name, weight in new.model.named_parameters()}
    grouped = {
        names[id(weight)]: group["weight_decay"]
        for group in optimizer.param_groups
        for weight in group["params"]
    }
    assert set(grouped) == set(names.values())
    undecayed = {name for name, decay in grouped.items() if decay == 0}
    assert "prefix" in undecayed
    assert all(
        ("norm" in n) or n.endswith("bias") or n == "prefix" or ".0." in n for n in undecayed
    )
    assert "head.weight" not in undecayed


def test_scores_are_scikit_learns():
    random = np.random.default_rng(0)
    names = ("a", "b", "c", "never")
    true = random.choice(names[:3], size=200, p=[0.7, 0.2, 0.1]).tolist()
    logits = random.normal(size=(200, 4)).astype(np.float32)
    logits[:, 3] = -20
    answers = [names[i] for i in logits.argmax(axis=1)]
    found = evaluate(logits, true, names)
    assert found.accuracy == pytest.approx(sklearn_metrics.accuracy_score(true, answers))
    assert found.macro_f1 == pytest.approx(
        sklearn_metrics.f1_score(true, answers, average="macro", labels=names[:3])
    )
    assert found.confusion == sklearn_metrics.confusion_matrix(true, answers, labels=names).tolist()
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert found.loss == pytest.approx(
        sklearn_metrics.log_loss(true, probabilities, labels=names), rel=1e-4
    )


def test_a_confident_model_that_is_right_half_the_time_is_badly_calibrated():
    logits = np.array([[9.0, 0.0]] * 10, dtype=np.float32)
    found = evaluate(logits, ["a", "b"] * 5, ("a", "b"))
    assert found.calibration_error == pytest.approx(0.5, abs=1e-3)


def test_a_label_that_the_model_lacks_is_named():
    with pytest.raises(InputError, match="'weather'"):
        evaluate(np.zeros((1, 2), np.float32), ["weather"], ("a", "b"))


def test_what_is_saved_is_the_running_average_of_the_weights(few, tmp_path):
    decay = 0.6
    new = make_model(SIMPLE, few)

    class Watching(Quiet):
        average = None

        def step(self, *progress):
            weight = new.model.head.weight.detach().clone()
            first = self.average is None
            self.average = weight if first else decay * self.average + (1 - decay) * weight

    watching = Watching()
    config = TrainConfig(epochs=1, learning_rate=1e-2, average_decay=decay)
    trained = fit(new, few, config, tmp_path, watching)
    saved = safetensors.torch.load_file(checkpoint.weights_path(tmp_path))["head.weight"]
    torch.testing.assert_close(saved, watching.average)
    torch.testing.assert_close(trained.model.head.weight, watching.average)

"""Weighted and focal losses beside PyTorch's own, scikit-learn's weights and a sum by hand."""

import math

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from trainkit.data.readers import Example
from trainkit.data.splits import Splits
from trainkit.serve.errors import InputError
from trainkit.trainer import run_folder
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.losses import balanced_weights, classification_loss
from trainkit.trainer.run import train
from trainkit.trainer.run_config import ModelSpec


@pytest.fixture
def batch():
    """Return logits (12, 4), uneven labels (12,) with every class, and weights (4,)."""
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 2, 3, 0, 0, 0, 0, 1, 0, 0, 2])
    return torch.randn(12, 4), labels, balanced_weights(labels, 4)


def test_balanced_weights_are_scikit_learns():
    labels = np.random.default_rng(0).choice(4, size=300, p=[0.7, 0.2, 0.07, 0.03])
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    found = balanced_weights(torch.from_numpy(labels), 4)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("gamma", [0.0, 1e-12], ids=["none", "almost none"])
def test_without_gamma_it_is_pytorchs_cross_entropy(gamma, smoothing, batch):
    """A gamma of almost nothing goes through the focal arithmetic, and its mean over weights."""
    logits, labels, weights = batch
    for chosen in (None, weights):
        expected = nn.CrossEntropyLoss(weight=chosen, label_smoothing=smoothing)(logits, labels)
        found = classification_loss(
            logits, labels, weights=chosen, label_smoothing=smoothing, focal_gamma=gamma
        )
        torch.testing.assert_close(found, expected)
    assert not torch.isclose(expected, F.cross_entropy(logits, labels))  # weights matter


def test_a_focal_loss_by_hand():
    """Two classes, probabilities of the label 0.9 and 0.2, gamma 2: 0.01 and 0.64 of the logs."""
    logits = torch.tensor([[math.log(0.9), math.log(0.1)], [math.log(0.8), math.log(0.2)]])
    labels = torch.tensor([0, 1])
    expected = (0.01 * -math.log(0.9) + 0.64 * -math.log(0.2)) / 2
    found = classification_loss(logits, labels, focal_gamma=2)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    weights = torch.tensor([1.0, 3.0])
    expected = (0.01 * -math.log(0.9) + 3 * 0.64 * -math.log(0.2)) / 4
    found = classification_loss(logits, labels, weights=weights, focal_gamma=2)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_gradients_of_the_focal_loss_are_right(batch):
    logits, labels, weights = batch
    logits = logits.double().requires_grad_()
    settings = {"weights": weights.double(), "label_smoothing": 0.1, "focal_gamma": 1.5}
    assert torch.autograd.gradcheck(
        lambda given: classification_loss(given, labels, **settings), logits
    )


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_a_certain_answer_gives_numbers(gamma):
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    loss = classification_loss(logits, torch.tensor([0, 0]), focal_gamma=gamma)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_a_training_uses_them(splits, tmp_path):
    """One class of six against all others: with weights, the rare one is answered more often."""

    def two_classes(examples):
        return tuple(Example(e.text, "b" if e.label == "HUM" else "a") for e in examples)

    few = Splits(*map(two_classes, (splits.train[:120], splits.valid[:40], splits.test)))
    model = ModelSpec(kind="simple", max_length=24)
    config = TrainConfig(epochs=2, learning_rate=5e-4, head_learning_rate=5e-4)
    runs = {
        name: train(model, few, msgspec.structs.replace(config, **setting), tmp_path / name)
        for name, setting in (
            ("plain", {}),
            ("balanced", {"class_weights": "balanced"}),
            ("focal", {"focal_gamma": 2.0}),
        )
    }
    rare = {name: sum(row[1] for row in run.test.confusion) for name, run in runs.items()}
    assert rare["balanced"] > rare["plain"]
    loss = {name: run.trained.history[0].train_loss for name, run in runs.items()}
    assert loss["focal"] < 0.6 * loss["plain"]  # (1 - p)^2 of it, where p is about a half
    kept = run_folder.read(runs["focal"].folder).training
    assert kept.focal_gamma == 2.0


def test_settings_that_do_not_work_are_named():
    for gamma in (-1.0, math.nan, 11.0):
        with pytest.raises(InputError, match="focal_gamma must be in"):
            TrainConfig(focal_gamma=gamma)

"""The learning-rate range test: what it chooses, and that the training after it is the same."""

import math
import random
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

from trainkit.cli import cli
from trainkit.data.splits import Splits
from trainkit.serve.errors import InputError
from trainkit.trainer import checkpoint, range_test
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.range_test import CURVE, PICTURE, RangeTest, RatePoint, choose, chosen
from trainkit.trainer.run_config import ModelSpec

SIMPLE = ModelSpec(kind="simple", max_length=24)
CONFIG = TrainConfig(epochs=1, batch_size=16)


@pytest.fixture
def few(splits):
    return Splits(splits.train[:80], splits.valid[:40], splits.test[:40])


@pytest.fixture(scope="module")
def tested(splits):
    return choose(SIMPLE, splits, CONFIG)[1]


def curve(loss, steps=100):
    """Make the points of a sweep whose smoothed loss is a function of the rate's exponent."""
    rates = np.logspace(-6, 0, steps)
    return [RatePoint(float(r), loss(math.log10(r)), loss(math.log10(r))) for r in rates]


@pytest.mark.parametrize("exponent", [-4.0, -3.0, -2.0])
def test_the_rate_is_where_a_known_curve_falls_steepest(exponent):
    """A logistic fall is steepest at its middle; past it the loss rises faster, which is none."""

    def loss(x):
        return 2 - 1 / (1 + math.exp(-4 * (x - exponent))) + 30 * max(0.0, x - exponent - 1.5) ** 2

    assert abs(math.log10(chosen(curve(loss))) - exponent) < 0.1


@pytest.mark.parametrize(
    "loss", [lambda x: 2.0, lambda x: 2 + (x + 6) / 6, lambda x: 2 - 0.001 * (x + 6)]
)
def test_a_loss_that_never_falls_is_told(loss):
    with pytest.raises(InputError, match="found no rate at which the loss falls; give one"):
        chosen(curve(loss))


def test_a_test_of_few_points_is_no_test():
    with pytest.raises(InputError, match="found no rate"):
        chosen(curve(lambda x: -x, steps=8))


def test_the_rates_rise_in_equal_shares_and_the_mean_is_corrected(tested):
    """The running mean against pandas' way of writing it: a sum of weights over their sum."""
    rates = np.array([point.rate for point in tested.points])
    assert rates[0] == pytest.approx(1e-6)
    assert np.allclose(np.diff(np.log(rates)), math.log(1e6) / 99)
    losses = np.array([point.loss for point in tested.points])
    for number in (0, 1, 7, len(losses) - 1):
        weights = 0.9 ** np.arange(number, -1, -1)
        expected = (weights * losses[: number + 1]).sum() / weights.sum()
        assert tested.points[number].smoothed == pytest.approx(expected)


def test_a_loss_that_runs_away_ends_it(few, monkeypatch):
    monkeypatch.setattr(range_test, "HIGHEST", 1e4)
    monkeypatch.setattr(range_test, "chosen", lambda points: 1e-3)  # so few texts teach nothing
    config, test = choose(SIMPLE, few, CONFIG)
    assert test.diverged_at is not None
    assert config.learning_rate == test.learning_rate < test.diverged_at
    assert len(test.points) < 100
    assert f"it ran away at {test.diverged_at:.1e}" in str(test)


def test_random_numbers_go_on_as_if_there_had_been_none(few, monkeypatch):
    monkeypatch.setattr(range_test, "STEPS", 25)
    monkeypatch.setattr(range_test, "chosen", lambda points: 1e-3)

    def drawn():
        return random.random(), float(np.random.random()), float(torch.rand(()))

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    expected = drawn()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    choose(SIMPLE, few, CONFIG)
    assert drawn() == expected


@pytest.mark.slow
def test_the_run_is_to_the_bit_the_one_with_that_rate_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(range_test, "STEPS", 60)

    def train(name, rate):
        command = ["train", "--data", "sample", "--model", "simple", "--epochs", "1"]
        command += ["--max-length", "16", "--runs", str(tmp_path), "--name", name, "--lr", rate]
        done = CliRunner().invoke(cli, command)
        assert done.exit_code == 0, done.output
        return tmp_path / name, done.stderr

    auto, told = train("auto", "auto")
    test = msgspec.json.decode((auto / CURVE).read_bytes(), type=RangeTest)
    assert f"learning rate {test.learning_rate:g}: there the loss fell steepest" in told
    picture = ElementTree.fromstring((auto / PICTURE).read_bytes())
    assert picture.tag.endswith("svg")
    assert f"chosen: {test.learning_rate:g}" in (auto / PICTURE).read_text()

    def kept(folder):
        weights = safetensors.torch.load_file(checkpoint.weights_path(folder))
        return weights, (folder / "config.toml").read_bytes()

    hand, _ = train("hand", repr(test.learning_rate))
    first, second = kept(auto), kept(hand)
    assert first[1] == second[1]
    assert all(torch.equal(first[0][name], second[0][name]) for name in second[0])
    assert not (hand / CURVE).exists()
    other = kept(train("other", repr(test.learning_rate * 1.01))[0])
    assert not all(torch.equal(first[0][name], other[0][name]) for name in other[0])


def test_a_rate_that_is_no_number_is_refused(tmp_path):
    command = ["train", "--data", "sample", "--model", "simple", "--runs", str(tmp_path)]
    done = CliRunner().invoke(cli, [*command, "--lr", "fast"])
    assert done.exit_code == 2
    assert "'fast' is neither a number nor 'auto'" in done.output
    assert not list(tmp_path.iterdir())

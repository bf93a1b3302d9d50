"""A learning-rate range test: the rate rises from step to step until the loss runs away.

Smith (2017), "Cyclical learning rates for training neural networks", section 3.3, here with an
exponential sweep. Returns the curve and the rate at which the loss fell steepest. A model of its
own is trained for it and thrown away, and the random numbers go on as if nothing had been: the
training that follows is the one with that rate by hand.
"""

import io
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import msgspec
import numpy as np
import torch
from matplotlib.figure import Figure

from trainkit.data.splits import Splits
from trainkit.models.classifier import UntrainedModel
from trainkit.serve.errors import InputError
from trainkit.serve.files import pretty_json, write_atomically
from trainkit.svg import COLOURS
from trainkit.trainer.batches import encode, shuffled
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.new_model import make_model
from trainkit.trainer.run_config import ModelSpec
from trainkit.trainer.setup import (
    choose_device,
    seed_everything,
)
from trainkit.trainer.train_step import DivergedError, make_context, train_step

CURVE, PICTURE = "lr_range.json", "lr_range.svg"
STEPS = 100
LOWEST, HIGHEST = 1e-6, 1.0
SMOOTHING = 0.9  # of the running mean of losses, corrected for its start as Adam's are
RUNAWAY = 1.5  # times the first loss: far above what chance gives
WINDOW = 10  # steps on either side that a slope is fitted to
LEAST_FALL = 0.98  # the lowest loss as a share of the first, or the fall is noise


class RatePoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One step: its rate, the loss before it, and the running mean of the losses."""

    rate: float
    loss: float
    smoothed: float


class RangeTest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The curve, and the rate at which the loss fell steepest before its lowest point.

    ``diverged_at`` is the rate at which the test ended early; None where it came to its end.
    """

    learning_rate: float
    diverged_at: float | None
    points: tuple[RatePoint, ...]

    def __str__(self) -> str:
        ran_away = "" if self.diverged_at is None else f"; it ran away at {self.diverged_at:.1e}"
        return (
            f"learning rate {self.learning_rate:g}: there the loss fell steepest in "
            f"{len(self.points)} steps from {self.points[0].rate:.0e} up{ran_away}"
        )

    def write(self, folder: Path) -> None:
        """Keep the curve as JSON and as a picture."""
        write_atomically(folder / CURVE, pretty_json(self))
        write_atomically(folder / PICTURE, picture(self))


def choose(spec: ModelSpec, splits: Splits, config: TrainConfig) -> tuple[TrainConfig, RangeTest]:
    """Test with a model of its own, and return the settings with the rate that was chosen."""
    with _random_numbers_kept():
        seed_everything(config.seed)
        test = range_test(make_model(spec, splits, config), splits, config)
    return msgspec.structs.replace(config, learning_rate=test.learning_rate), test


def range_test(new: UntrainedModel, splits: Splits, config: TrainConfig) -> RangeTest:
    """Sweep the rate of the encoder or its prefix; ``new`` is trained by it, so give one to lose.

    The head stays as it is; all else is as in the training. Raises ``InputError`` if the loss never
    falls.
    """
    with _random_numbers_kept():
        points, diverged_at = _sweep(new, splits, config)
    return RangeTest(chosen(points), diverged_at, tuple(points))


def chosen(points: list[RatePoint]) -> float:
    """Return the rate of the steepest fall, to two digits; ``InputError`` if none."""
    smoothed = np.array([point.smoothed for point in points])
    # The mean of the first points is one of few losses.
    lowest = int(smoothed[WINDOW:].argmin()) + WINDOW if len(smoothed) > WINDOW else 0
    if lowest < 2 * WINDOW or smoothed[lowest] > smoothed[WINDOW] * LEAST_FALL:
        raise InputError(
            "--learning-rate auto found no rate at which the loss falls; give one, for example "
            "--learning-rate 1e-3."
        )
    # Lines through the losses around each point (Savitzky & Golay 1964): unlike the running mean
    # they lag behind nothing. The sweep is exponential, so these are slopes over log(rate).
    losses = np.array([point.loss for point in points[: lowest + 1]])
    offsets = np.arange(-WINDOW, WINDOW + 1)
    slopes = np.correlate(losses, offsets, mode="valid")  # the first is of point WINDOW
    return float(f"{points[WINDOW + int(slopes.argmin())].rate:.1e}")


def _sweep(
    new: UntrainedModel, splits: Splits, config: TrainConfig
) -> tuple[list[RatePoint], float | None]:
    model, encoder = new
    seed_everything(config.seed)
    device = choose_device(config.device)
    model.to(device).train()
    data = encode(splits.train, encoder, model.config.labels)
    # A head that learned at its own rate from the first step on would let the loss fall soonest
    # where the swept rate is too low to do anything (tried on MiniLM and from scratch).
    for weight in model.head_parameters():
        weight.requires_grad_(False)
    plain = msgspec.structs.replace(config, compile=False, precision="fp32", average_decay=0.0)
    context = make_context(model, data, plain)
    batches = itertools.chain.from_iterable(
        shuffled(data, config.batch_size, config.seed, epoch, config.batch_tokens)
        for epoch in itertools.count(1)
    )
    points: list[RatePoint] = []
    mean = 0.0
    for step, batch in enumerate(itertools.islice(batches, STEPS)):
        rate = LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1))
        for group in context.optimizer.param_groups:
            group["lr"] = rate
        try:
            loss, _ = train_step(context, batch)
        except DivergedError:
            return points, rate
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smoothed = mean / (1 - SMOOTHING ** (step + 1))
        if points and smoothed > RUNAWAY * points[0].loss:
            return points, rate
        points.append(RatePoint(rate, loss, smoothed))
    return points, None


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Leave Python's, numpy's and torch's random numbers as they were."""
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)


def picture(test: RangeTest) -> bytes:
    """Draw the losses over the rate as SVG; the same curve gives the same bytes."""
    rates = [point.rate for point in test.points]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, [p.loss for p in test.points], ".", color=COLOURS[-1], label="of one step")
    axes.plot(rates, [p.smoothed for p in test.points], color=COLOURS[0], label="running mean")
    name = f"chosen: {test.learning_rate:g}"
    axes.axvline(test.learning_rate, color=COLOURS[1], linestyle="--", label=name)
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss", title="Learning-rate range test")
    axes.legend()
    with mpl.rc_context({"svg.hashsalt": "trainkit", "svg.fonttype": "none"}):
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return written.getvalue().encode()

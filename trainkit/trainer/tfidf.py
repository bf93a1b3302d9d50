"""Fits the linear half of ``simple``: logistic regression on tf-idf of words and bigrams.

N texts, R rows of words and bigrams, C classes.
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainkit.models.bigrams import BigramLinear
from trainkit.serve.encoding import by_length, pad
from trainkit.trainer.batches import BATCH_TOKENS

logger = logging.getLogger("trainkit")

MIN_TEXTS = 2  # that a pair occurs in
MAX_PAIRS = 65_536
PENALTY = 1 / 30  # of the squared weights, beside the sum over the texts: as C = 30 elsewhere
MAX_ITERATIONS = 500
TOLERANCE = 1e-4  # of the mean loss's gradient, as in scikit-learn


def frequent_pairs(rows: Sequence[Sequence[int]], vocabulary: int, unknown: int) -> Tensor:
    """Return the keys of the pairs of known neighbours in these texts (ragged ids), (K,) int64.

    The commonest first, equally common ones in the order of their ids. The key of words a and b is
    ``vocabulary * a + b``.
    """
    lengths = [len(row) for row in rows]
    ids = np.fromiter((token for row in rows for token in row), np.int64, sum(lengths))
    text = np.repeat(np.arange(len(rows)), lengths)
    first, second = ids[:-1], ids[1:]
    found = (text[:-1] == text[1:]) & (first != unknown) & (second != unknown)
    keys = first[found] * vocabulary + second[found]
    each = np.unique(np.stack([keys, text[:-1][found]]), axis=1)[0]  # once a text
    keys, texts = np.unique(each, return_counts=True)
    keys, texts = keys[texts >= MIN_TEXTS], texts[texts >= MIN_TEXTS]
    return torch.from_numpy(keys[np.argsort(-texts, kind="stable")][:MAX_PAIRS])


@torch.no_grad()
def fit_bigrams(
    model: BigramLinear,
    rows: Sequence[Sequence[int]],
    pairs: Tensor,
    labels: Tensor,
    unknown: int,
    class_weights: Tensor | None = None,
) -> None:
    """Give ``model`` its pairs and weights, from texts (ragged ids) and their labels (N,).

    ``pairs`` are what :func:`frequent_pairs` found in the same texts. The loss is the mean of the
    texts' cross entropies, each times the weight of its class (C,), and 1/N of half the squared
    weights times the penalty; L-BFGS (Liu & Nocedal 1989) finds its minimum. Where it does not
    come to it in its iterations, that is logged, and the weights are what it came to.
    """
    model.place(pairs)
    text, row = _occurrences(model, rows, unknown)
    _weigh(model, text, row, len(rows))
    squares = torch.zeros(len(rows)).index_add_(0, text, model.scale[row].square())
    values = model.scale[row] / squares.clamp(min=1e-3).sqrt()[text]
    starts = torch.searchsorted(text, torch.arange(len(rows)))
    weight = torch.zeros_like(model.weight, requires_grad=True)
    bias = torch.zeros_like(model.bias, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITERATIONS,
        history_size=10,
        tolerance_grad=TOLERANCE,
        tolerance_change=0.0,  # a small step is no minimum
        line_search_fn="strong_wolfe",
    )

    @torch.enable_grad()
    def loss() -> Tensor:
        solver.zero_grad()
        logits = F.embedding_bag(row, weight, starts, mode="sum", per_sample_weights=values) + bias
        each = F.cross_entropy(logits, labels, weight=class_weights, reduction="sum")
        mean = (each + PENALTY / 2 * weight.square().sum()) / len(rows)
        mean.backward()
        return mean

    solver.step(loss)
    loss()
    slopes = [part.grad.flatten() for part in (weight, bias) if part.grad is not None]
    steepest = float(torch.cat(slopes).abs().max())
    if not steepest <= TOLERANCE:  # NaN too
        logger.warning(
            "the weights of words and pairs are not at the minimum of their loss after %d "
            "iterations: its gradient has %.1e, where at most %.0e was wanted; they are used as "
            "they are.",
            solver.state[weight]["n_iter"],
            steepest,
            TOLERANCE,
        )
    model.weight.copy_(weight * model.scale[:, None])
    model.bias.copy_(bias)


def _occurrences(
    model: BigramLinear, rows: Sequence[Sequence[int]], unknown: int
) -> tuple[Tensor, Tensor]:
    """Return text and row of every known word and pair in the texts, text by text."""
    texts, found = [], []
    for places in by_length([len(row) for row in rows], len(rows), BATCH_TOKENS):
        ids, mask, _ = pad([rows[place] for place in places], 0)
        of_batch = model.rows(torch.from_numpy(ids), torch.from_numpy(mask))
        known = (of_batch != model.absent) & (of_batch != unknown)
        texts.append(torch.tensor(places)[:, None].expand_as(of_batch)[known])
        found.append(of_batch[known])
    text, order = torch.cat(texts).sort(stable=True)
    return text, torch.cat(found)[order]


def _weigh(model: BigramLinear, text: Tensor, row: Tensor, texts: int) -> None:
    """Set each row's inverse document frequency, smoothed as if one more text had every one.

    Divided by the highest that there can be: a text's length comes out, and halves do not overflow.
    """
    each = torch.unique(torch.stack([text, row]), dim=1)[1]
    frequency = torch.bincount(each, minlength=len(model.scale))
    highest = np.log((1 + texts) / 2) + 1
    inverse = torch.log((1 + texts) / (1 + frequency)) + 1
    model.scale.copy_(torch.where(frequency > 0, inverse / highest, 0.0))

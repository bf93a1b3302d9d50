"""Words and phrases: against a plain implementation, text by text, without padding."""

from itertools import pairwise

import msgspec
import pytest
import torch
from torch import nn

from trainkit.models.bigrams import BigramLinear
from trainkit.models.classifier import build
from trainkit.models.config import ModelConfig, TextCNNConfig
from trainkit.serve.errors import InputError

SIZES = TextCNNConfig(
    vocabulary_size=50, unknown_id=1, embedding_size=8, filters=5, windows=(1, 2, 3), pairs=4
)
CONFIG = ModelConfig(
    kind="simple", labels=("a", "b", "c"), max_length=12, pad_id=0, dropout=0.0, text_cnn=SIZES
)
PAIRS = [(9, 3), (7, 9), (5, 4), (41, 5)]
TEXTS = [[7, 9, 3, 9, 22, 41, 5], [4], [30, 7, 9], [11, 49, 1, 2]]


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = build(CONFIG)
    linear = made.bigrams
    linear.place(torch.tensor([first * 50 + second for first, second in PAIRS]))
    linear.scale[:-1].uniform_(0.1, 1)  # zeros would hide which row is read
    linear.weight[:-1].normal_()
    linear.bias.normal_()
    nn.init.normal_(made.tokens.weight)
    return made.eval()


def padded(texts, length, places=None):
    """Lay texts out at the given places of each row; right padding where none are given."""
    ids = torch.full((len(texts), length), 17)  # what lies under the mask must not matter
    mask = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in enumerate(texts):
        at = list(range(len(text))) if places is None else places(len(text), length)
        ids[row, at], mask[row, at] = torch.tensor(text), 1
    return ids, mask


def plainly(model, text):
    """The logits of one text: torch's own convolution, and a loop over its pairs."""
    encoder = model
    words = encoder.tokens.weight[torch.tensor(text)].T[None]  # (1, H, S)
    features = []
    for convolution in encoder.convolutions:
        k, f = convolution.window, convolution.filters
        filters = convolution.parts.weight.view(k, f, -1).permute(1, 2, 0)  # (F, H, K)
        values = nn.functional.conv1d(words, filters, convolution.bias, padding=k - 1)
        features.append(values.relu().amax(dim=2)[0])
    linear = encoder.bigrams
    rows = [*text, *(50 + PAIRS.index(two) for two in pairwise(text) if two in PAIRS)]
    weights = linear.weight[rows].sum(dim=0) / linear.scale[rows].norm() + linear.bias
    return (model.head(torch.cat(features)) + weights) / 2


@pytest.mark.parametrize("length", [7, 12])
def test_a_batch_gives_what_each_text_gives_alone(model, length):
    with torch.no_grad():
        logits = model(*padded(TEXTS, length))
        expected = torch.stack([plainly(model, text) for text in TEXTS])
        torch.testing.assert_close(logits, expected)
        model.convolutions[1].bias[0] += 5
        with pytest.raises(AssertionError):  # the comparison can fail
            torch.testing.assert_close(model(*padded(TEXTS, length)), expected)


def test_left_padding_changes_nothing(model):
    with torch.no_grad():
        right = model(*padded(TEXTS, 12))
        left = model(*padded(TEXTS, 12, lambda size, length: list(range(length - size, length))))
    torch.testing.assert_close(left, right)


def test_a_blank_row_gets_the_bias_alone(model):
    with torch.no_grad():
        blank = model(torch.full((2, 3), 9), torch.tensor([[0, 0, 0], [0, 1, 0]]))
        bias = (model.head.bias + model.bigrams.bias) / 2
        torch.testing.assert_close(blank[0], bias)
        torch.testing.assert_close(blank[1], plainly(model, [9]))


def test_what_is_trained_has_logits_of_its_own(model):
    model.train()
    model.bigrams.forward = None  # and is not computed
    loss = model(*padded(TEXTS, 7)).sum()
    loss.backward()
    assert model.head.weight.grad is not None


def test_a_pair_whose_slot_a_commoner_one_has_is_unknown():
    linear = BigramLinear(50, 2, 3)
    first, second = 7 * 50 + 9, 7 * 50 + 9 + len(linear.slots)
    linear.place(torch.tensor([first, second]))
    ids = torch.tensor([divmod(first, 50), divmod(second, 50)])
    assert linear.rows(ids, torch.ones_like(ids))[:, 2].tolist() == [50, linear.absent]


def test_rare_words_are_taken_for_the_unknown_one_while_it_is_trained(model):
    encoder = model
    encoder.count([[7, 9, 9, 9], [9] * 96])
    assert encoder.drop_share[7] == 0.5
    assert encoder.drop_share[9] == pytest.approx(1 / 100)
    read = []
    encoder.tokens.register_forward_hook(lambda _, inputs, __: read.append(inputs[0]))
    ids, mask = padded([[7, 9]] * 2000, 3)
    encoder.train()(ids, mask)
    encoder.eval()(ids, mask)
    trained, served = read
    assert torch.equal(served, ids)
    dropped = (trained == SIZES.unknown_id).float().mean(dim=0)
    assert 0.45 < dropped[0] < 0.55
    assert 0 < dropped[1] < 0.03
    assert dropped[2] == 0  # padding
    assert "drop_share" not in model.trained_state()


@pytest.mark.parametrize(
    "wrong",
    [{"filters": 0}, {"windows": ()}, {"windows": (2, 0)}, {"word_dropout": 1.0}, {"pairs": -1}],
)
def test_sizes_that_do_not_work_are_refused(wrong):
    with pytest.raises(InputError, match="must"):
        msgspec.structs.replace(SIZES, **wrong)


def test_exactly_one_encoder_is_described():
    with pytest.raises(InputError, match="exactly one of transformer, text_cnn and backbone"):
        msgspec.structs.replace(CONFIG, text_cnn=None)

"""The one attention function against PyTorch's own, and what packing may never change."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trainkit.models.attention import KeyValuePrefix, MaskPlan, attend

HEADS, HEAD_SIZE = 4, 8

any_mask = hnp.arrays(
    "int64", hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 1)
)


def heads_of(states):
    """(B or 1, S or T, A * D) to (., A, ., D)."""
    return states.unflatten(2, (HEADS, HEAD_SIZE)).transpose(1, 2)


@settings(max_examples=60, deadline=None)
@given(any_mask)
def test_unpack_of_pack_gives_every_kept_token_back(mask):
    mask = torch.from_numpy(mask)
    states = torch.randn(*mask.shape, 3)
    plan = MaskPlan(mask)
    again = plan.unpack(plan.pack(states))
    kept = mask.bool()
    kept[:, 0] = True
    assert plan.pack(states).shape[1] == int(kept.sum())
    assert torch.equal(again[kept], states[kept])


@settings(max_examples=60, deadline=None)
@given(any_mask)
def test_packed_attention_is_padded_attention(mask):
    mask = torch.from_numpy(mask)
    query, key, value = (torch.randn(*mask.shape, HEADS * HEAD_SIZE) for _ in range(3))
    plan = MaskPlan(mask)
    packed = attend(*(heads_of(plan.pack(states)) for states in (query, key, value)), plan)
    ours = plan.unpack(packed.flatten(2))
    # PyTorch's own, masked by -inf; a row without any key is defined as zero there too.
    expected = F.scaled_dot_product_attention(
        *(heads_of(states) for states in (query, key, value)), attn_mask=mask.bool()[:, None, None]
    )
    expected = expected.transpose(1, 2).flatten(2)
    kept = mask.bool()
    kept[:, 0] = True  # computed for heads that pool it, even where it is padding
    assert torch.isfinite(ours).all()
    torch.testing.assert_close(ours[kept], expected[kept], rtol=1e-5, atol=1e-6)


def test_a_hidden_token_has_no_influence():
    mask = torch.tensor([[1, 1, 0, 1, 0]])
    states = torch.randn(1, 5, HEADS * HEAD_SIZE)
    changed = states.clone()
    changed[0, [2, 4]] = 1000.0
    plan = MaskPlan(mask)
    first, second = (attend(*[heads_of(plan.pack(x))] * 3, plan) for x in (states, changed))
    assert torch.equal(first, second)


def test_every_visible_token_has_influence_also_on_those_before_it():
    """A causal mask would let the first token see only itself."""
    states = torch.randn(1, 5, HEADS * HEAD_SIZE)
    plan = MaskPlan(torch.ones(1, 5))
    first = attend(*[heads_of(plan.pack(states))] * 3, plan)[0, 0]
    for position in range(1, 5):
        changed = states.clone()
        changed[0, position] += 1.0
        assert not torch.allclose(attend(*[heads_of(plan.pack(changed))] * 3, plan)[0, 0], first)


def test_rows_of_a_batch_do_not_see_each_other():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    states = torch.randn(2, 4, HEADS * HEAD_SIZE)
    plan = MaskPlan(mask)
    both = plan.unpack(attend(*[heads_of(plan.pack(states))] * 3, plan).flatten(2))
    alone = MaskPlan(mask[:1])
    single = alone.unpack(attend(*[heads_of(alone.pack(states[:1]))] * 3, alone).flatten(2))
    shown = [0, 2, 3]  # position 0 is kept though it is padding: a head may pool it
    torch.testing.assert_close(both[0, shown], single[0, shown])


def test_prefix_positions_are_visible_in_every_row():
    prefix = KeyValuePrefix(HEADS, 3, HEAD_SIZE)
    plan = MaskPlan(torch.tensor([[1, 1, 0], [0, 0, 0]]))
    assert plan.visible(prefix.length).shape == (2, 1, 3, 6)
    assert plan.visible(prefix.length)[..., :3].all()
    states = [heads_of(plan.pack(torch.randn(2, 3, HEADS * HEAD_SIZE))) for _ in range(3)]
    with_prefix = attend(*states, plan, prefix=prefix)
    assert not torch.allclose(with_prefix, attend(*states, plan))
    # The fully masked row sees the prefix and nothing else.
    query = plan.unpack(states[0].transpose(1, 2))[1, 0]  # (A, D)
    weights = torch.softmax(query.unsqueeze(1) @ prefix.key.transpose(1, 2) / HEAD_SIZE**0.5, -1)
    expected = (weights @ prefix.value).squeeze(1)
    torch.testing.assert_close(plan.unpack(with_prefix)[1, 0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [1, 4])
def test_a_batch_of_blank_rows_gives_finite_numbers(length):
    plan = MaskPlan(torch.zeros(3, length, dtype=torch.int64))
    states = heads_of(plan.pack(torch.randn(3, length, HEADS * HEAD_SIZE)))
    assert torch.equal(attend(states, states, states, plan), torch.zeros(1, 3, HEADS, HEAD_SIZE))

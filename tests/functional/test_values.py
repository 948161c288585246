"""Token rewards, generalised advantages and the value loss: by hand, against a slow twin, and by their identities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab.functional.reduction import mean_and_variance, moments
from alignlab.functional.values import explained_variance, gae, token_rewards, value_loss, whitened
from tests.reference import functional as slow

# A shared prompt of 2, then a completion of 3, then one of 4 whose second token is a tool's.
IDS = torch.tensor([-1, -1, 0, 0, 0, 1, 1, 1, 1])
MASK = torch.tensor([False, False, True, True, True, True, False, True, True])


def test_rewards_fall_on_the_last_step_and_the_kl_on_each():
    kl = torch.tensor([9.0, 9.0, 1.0, -2.0, 3.0, 4.0, 9.0, 5.0, 6.0])
    found = token_rewards(torch.tensor([10.0, -7.0]), kl, mask=MASK, sequence_ids=IDS, kl_coef=0.5)
    assert found.tolist() == [0, 0, -0.5, 1.0, 10 - 1.5, -2.0, 0, -2.5, -7 - 3.0]


def test_a_sequence_that_wrote_nothing_has_no_reward():
    mask = MASK & (IDS == 0)
    found = token_rewards(torch.tensor([1.0, 5.0]), torch.zeros(9), mask=mask, sequence_ids=IDS, kl_coef=1.0)
    assert found.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]


def test_gae_by_hand():
    rewards = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 2.0])
    values = torch.tensor([9.0, 9.0, 0.5, 0.25, 0.5, 1.0, 9.0, 2.0, 1.0])
    found = gae(rewards, values, mask=MASK, sequence_ids=IDS, num_sequences=2, gamma=1.0, lam=0.5)
    # First: deltas -0.25, 0.25, 0.5. Second, the tool's token passed over: deltas 1, -1, 1.
    first = [-0.25 + 0.5 * (0.25 + 0.5 * 0.5), 0.25 + 0.5 * 0.5, 0.5]
    second = [1 + 0.5 * (-1 + 0.5 * 1), -1 + 0.5 * 1, 1]
    assert found.tolist() == [0, 0, *first, second[0], 0, *second[1:]]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4), seed=st.integers(0, 99),
    gamma=st.sampled_from([1.0, 0.9]), lam=st.sampled_from([0.0, 0.7, 1.0]),
)
def test_gae_equals_the_slow_twin(lengths, seed, gamma, lam):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    ids = torch.tensor([-1] + [b for b in order for _ in range(2 * lengths[b])])
    mask = (torch.rand(len(ids), generator=generator) > 0.4) & (ids >= 0)
    rewards, values = torch.randn(2, len(ids), generator=generator, dtype=torch.float64)
    found = gae(rewards, values, mask=mask, sequence_ids=ids, num_sequences=len(lengths), gamma=gamma, lam=lam)
    expected = torch.zeros_like(rewards)
    for b in range(len(lengths)):
        own = (ids == b) & mask
        expected[own] = torch.tensor(
            slow.gae(rewards[own].tolist(), values[own].tolist(), gamma, lam), dtype=torch.float64
        )
    torch.testing.assert_close(found, expected)


def test_lambda_one_is_returns_less_values_and_lambda_zero_one_step():
    rewards, values = torch.randn(2, 9)
    where = dict(mask=MASK, sequence_ids=IDS, num_sequences=2)
    total = [rewards[t:5].sum() - values[t] for t in (2, 3, 4)]
    torch.testing.assert_close(gae(rewards, values, **where, gamma=1.0, lam=1.0)[2:5], torch.stack(total))
    one = torch.stack([rewards[2] + values[3] - values[2], rewards[3] + values[4] - values[3], rewards[4] - values[4]])
    torch.testing.assert_close(gae(rewards, values, **where, gamma=1.0, lam=0.0)[2:5], one)


def test_gae_without_tokens_is_zero():
    none = torch.zeros(9, dtype=torch.bool)
    found = gae(torch.ones(9), torch.ones(9), mask=none, sequence_ids=IDS, num_sequences=2, gamma=1.0, lam=1.0)
    assert found.tolist() == [0.0] * 9


@pytest.mark.parametrize(
    ("value", "old", "target", "clip", "loss", "gradient"),
    [
        (1.0, 0.0, 3.0, None, 2.0, -2.0),
        (1.0, 0.0, 3.0, 0.2, 0.5 * 2.8**2, 0.0),  # moved too far towards the target: no further pull
        (1.0, 0.0, -1.0, 0.2, 2.0, 2.0),  # moved away from it: the plain error is worse, and pulls back
        (0.1, 0.0, 3.0, 0.2, 0.5 * 2.9**2, -2.9),  # within the bound
    ],
)
def test_value_loss_by_hand(value, old, target, clip, loss, gradient):
    values = torch.tensor([value], requires_grad=True)
    found, clipped = value_loss(values, torch.tensor([old]), torch.tensor([target]), clip=clip)
    found.sum().backward()
    assert found.item() == pytest.approx(loss) and values.grad.item() == pytest.approx(gradient)
    assert clipped.item() == (gradient == 0.0)


def test_whitening_over_two_packs_is_whitening_of_both():
    x, mask = torch.randn(12) * 3 + 5, torch.rand(12) > 0.3
    totals = moments(x[:5], mask[:5]) + moments(x[5:], mask[5:])
    mean, variance = mean_and_variance(totals)
    assert mean == pytest.approx(float(x[mask].mean())) and variance == pytest.approx(float(x[mask].var()))
    white = whitened(x, mask, mean=mean, variance=variance)
    assert float(white[mask].mean()) == pytest.approx(0.0, abs=1e-6) and float(white[mask].std()) == pytest.approx(1.0)
    assert white[~mask].abs().max() == 0
    assert mean_and_variance(moments(x, torch.zeros(12, dtype=torch.bool))) == (0.0, 0.0)


def test_explained_variance():
    returns, mask = torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.tensor([True, True, True, False])

    def explained(values):
        return explained_variance(moments(returns, mask), moments(returns - values, mask))

    assert explained(returns) == pytest.approx(1.0) and explained(returns - 4) == pytest.approx(1.0)
    assert explained(torch.zeros(4)) == pytest.approx(0.0)
    assert explained(-returns) == pytest.approx(1 - 4.0)
    assert explained_variance(moments(torch.ones(4), mask), moments(torch.ones(4), mask)) == 0.0
    assert not math.isnan(explained(torch.full((4,), 1e6)))


def test_a_value_within_the_bounds_is_not_clipped_whatever_rounding_says():
    generator = torch.Generator().manual_seed(0)
    old, near, returns = (scale * (2 * torch.rand(1000, generator=generator) - 1) for scale in (0.1, 0.1, 1.0))
    assert ((old + (near - old) - returns).square() > (near - returns).square()).any()
    assert not value_loss(near, old, returns, clip=0.2)[1].any()
    far = old + 0.5 * (old - returns).sign()
    assert not value_loss(far, old, returns, clip=0.2)[1].any(), "the worse error is the plain one"
    assert value_loss(old - 0.1 * (old - returns), old, returns, clip=1e-6)[1].float().mean() > 0.9

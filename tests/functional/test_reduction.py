import pytest
import torch

from alignlab.functional import reduction


def test_sequence_sum_by_hand():
    x = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    ids = torch.tensor([2, -1, 0, 2, 0])
    assert reduction.sequence_sum(x, ids, num_sequences=4).tolist() == [20.0, 0.0, 9.0, 0.0]


def test_sequence_sum_ignores_even_nan_outside_sequences():
    sums = reduction.sequence_sum(torch.tensor([1.0, float("nan")]), torch.tensor([0, -1]), num_sequences=1)
    assert sums.tolist() == [1.0]


def test_sequence_sum_adds_the_tokens_of_a_sequence_in_their_order():
    """2^24 + 1 + 1 is 2^24 in float32, and 1 + 1 + 2^24 is not; other sequences lie between."""
    big = 2.0**24
    x = torch.tensor([big, 1.0, 1.0, 1.0, 1.0, big])
    sums = reduction.sequence_sum(x, torch.tensor([1, 0, 1, 0, 1, 0]), num_sequences=2)
    assert sums.tolist() == [big + 2, big]


def test_the_gradient_of_a_sequence_sum_is_one_on_its_tokens():
    x = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([2, -1, 0, 2])
    assert torch.autograd.gradcheck(lambda x: reduction.sequence_sum(x, ids, num_sequences=4), x)
    (reduction.sequence_sum(x, ids, num_sequences=4) * torch.tensor([3.0, 5.0, 7.0, 9.0])).sum().backward()
    assert x.grad.tolist() == [7.0, 0.0, 3.0, 7.0]


def test_sequence_sum_is_float32_for_half_precision():
    ones = torch.ones(1000, dtype=torch.bfloat16)
    sums = reduction.sequence_sum(ones, torch.zeros(1000, dtype=torch.long), num_sequences=1)
    assert sums.dtype == torch.float32
    assert sums.item() == 1000.0


def test_sequence_mean_is_over_masked_tokens_and_ignores_nan_elsewhere():
    x = torch.tensor([1.0, float("nan"), 4.0, 8.0, 16.0])
    mask, ids = torch.tensor([True, False, True, True, True]), torch.tensor([2, 2, 0, 2, -1])
    assert reduction.sequence_mean(x, mask, ids, num_sequences=3).tolist() == [4.0, 0.0, 4.5]


def test_values_of_sequences_are_spread_over_their_tokens():
    spread = reduction.on_tokens(torch.tensor([0.5, 2.0]), torch.tensor([1, -1, 0, 1]), elsewhere=-1.0)
    assert spread.tolist() == [2.0, -1.0, 0.5, 2.0]


def test_token_mean_counts_every_token_the_same():
    mask = torch.tensor([True, False, True])
    assert reduction.token_mean_weights(mask, num_tokens=4).tolist() == [0.25, 0.0, 0.25]


def test_sequence_mean_counts_every_sequence_the_same():
    mask = torch.tensor([False, True, True, True, True])
    ids = torch.tensor([-1, 0, 0, 0, 1])
    tokens = torch.tensor([3, 1])
    weights = reduction.sequence_mean_weights(mask, ids, tokens, num_sequences=2)
    torch.testing.assert_close(weights, torch.tensor([0.0, 1 / 6, 1 / 6, 1 / 6, 1 / 2]))
    loss = torch.tensor([9.0, 1.0, 2.0, 3.0, 10.0])
    assert (loss * weights).sum().item() == pytest.approx((2.0 + 10.0) / 2)


def test_sequence_without_masked_tokens_has_no_weight():
    mask = torch.tensor([True, False])
    weights = reduction.sequence_mean_weights(mask, torch.tensor([0, 1]), torch.tensor([1, 0]), num_sequences=2)
    assert weights.tolist() == [0.5, 0.0]


def test_constant_weights_do_not_depend_on_lengths():
    mask = torch.tensor([True, True, False])
    assert reduction.constant_weights(mask, num_sequences=4, max_tokens=8).tolist() == [1 / 32, 1 / 32, 0.0]


def test_reductions_agree_when_all_sequences_reach_the_limit():
    ids = torch.arange(3).repeat_interleave(5)
    mask = torch.ones(15, dtype=torch.bool)
    token = reduction.token_mean_weights(mask, num_tokens=15)
    sequence = reduction.sequence_mean_weights(mask, ids, torch.full((3,), 5), num_sequences=3)
    constant = reduction.constant_weights(mask, num_sequences=3, max_tokens=5)
    torch.testing.assert_close(token, sequence)
    torch.testing.assert_close(token, constant)


def test_a_step_without_tokens_is_refused():
    with pytest.raises(ValueError, match="num_tokens is 0, and must be at least 1"):
        reduction.token_mean_weights(torch.zeros(2, dtype=torch.bool), num_tokens=0)
    with pytest.raises(ValueError, match="num_sequences is 0"):
        reduction.constant_weights(torch.zeros(2, dtype=torch.bool), num_sequences=0, max_tokens=1)

"""Losses that balance groups and sequences, of noisy routers, and of routers learnt by REINFORCE."""

import math

import pytest
import torch

from alignlab.functional.moe_losses import (
    communication_balance_loss,
    expected_load_loss,
    group_balance_loss,
    importance_loss,
    ordered_choice_logprob,
    routing_policy_loss,
    sequence_balance_loss,
)
from tests.reference.routers import drawing_logprob, sequence_balance


def test_group_balance_loss_of_two_tokens() -> None:
    probs = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.0, 0.0, 0.5, 0.5]])
    load = torch.tensor([0.4, 0.2, 0.3, 0.1])
    # f = 4 * load = [1.6, 0.8, 1.2, 0.4], so f' = [1.2, 0.8]; P' = [0.75, 0.25] and [0, 1]
    expected = torch.tensor([1.2 * 0.75 + 0.8 * 0.25, 0.8])
    torch.testing.assert_close(group_balance_loss(probs, load, num_groups=2), expected)


def test_communication_balance_loss_of_two_tokens() -> None:
    probs = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.0, 0.0, 0.5, 0.5]])
    sent = torch.tensor([1.0, 0.25])  # every token to the first of two devices, a quarter to the second
    # f'' = 2 / 1 * sent = [2, 0.5] where a token may use one device
    expected = torch.tensor([2.0 * 0.75 + 0.5 * 0.25, 0.5])
    torch.testing.assert_close(communication_balance_loss(probs, sent, max_groups=1), expected)
    torch.testing.assert_close(communication_balance_loss(probs, sent, max_groups=2), expected / 2)


def test_group_losses_are_one_at_even_load() -> None:
    probs = torch.randn(5, 6).softmax(-1)
    torch.testing.assert_close(group_balance_loss(probs, torch.full((6,), 1 / 6), num_groups=3), torch.ones(5))
    sent = torch.full((3,), 2 / 3)
    torch.testing.assert_close(communication_balance_loss(probs, sent, max_groups=2), torch.ones(5))


def test_sequence_balance_loss_of_two_sequences_by_hand() -> None:
    probs = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.3, 0.7]])
    # First sequence: both tokens take expert 0, f = 2 / (1 * 2) * [2, 0] = [2, 0]. Second: f = 2 * [0, 1].
    expected = torch.tensor([2 * 0.6, 2 * 0.9, 2 * 0.7])
    of_token = torch.tensor([0, 0, 1])
    torch.testing.assert_close(
        sequence_balance_loss(probs, of_token, num_sequences=2, num_chosen=1), expected
    )


def test_sequence_balance_loss_equals_the_loop_and_leaves_uncounted_tokens_out() -> None:
    torch.manual_seed(0)
    probs = torch.randn(9, 5).softmax(-1)
    of_token = torch.tensor([0, 0, 1, 2, 2, 2, 1, 0, 1])
    counted = torch.tensor([True, True, True, False, True, True, True, False, True])
    expected = sequence_balance(probs, [[0, 1], [2, 6, 8], [4, 5]], num_chosen=2)
    ours = sequence_balance_loss(probs, of_token, num_sequences=3, num_chosen=2, counted=counted)
    torch.testing.assert_close(ours, expected)


def test_sequence_balance_gradient_does_not_depend_on_which_sequences_share_a_batch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 4)
    whole, parts = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    of_token = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    sequence_balance_loss(whole.softmax(-1), of_token, num_sequences=3, num_chosen=2).sum().backward()
    for start, end in ((0, 3), (3, 7)):
        piece = parts[start:end].softmax(-1)
        sequence_balance_loss(piece, of_token[start:end], num_sequences=3, num_chosen=2).sum().backward()
    torch.testing.assert_close(whole.grad, parts.grad)


def test_importance_loss_is_the_squared_variation_of_summed_gates() -> None:
    gates = torch.tensor([[0.75, 0.25, 0.0], [0.5, 0.0, 0.5], [0.0, 0.25, 0.75]])
    # Sums [1.25, 0.5, 1.25]: mean 1, variance (0.0625 + 0.25 + 0.0625) / 3 = 0.125
    torch.testing.assert_close(importance_loss(gates), torch.tensor(0.125))


def test_expected_load_loss_of_one_token_by_hand() -> None:
    logits, noisy = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[0.5, 0.0, -2.0]])
    std = torch.tensor([[1.0, 2.0, 1.0]])
    # K = 1: expert 0 must beat the second best, 0; the others must beat the best, 0.5.
    chances = [0.5 * (1 + math.erf(z / math.sqrt(2))) for z in (1.0 - 0.0, (0.0 - 0.5) / 2, -1.0 - 0.5)]
    mean = sum(chances) / 3
    expected = sum((chance - mean) ** 2 for chance in chances) / 3 / mean**2
    torch.testing.assert_close(expected_load_loss(logits, noisy, std, num_chosen=1), torch.tensor(expected))
    assert expected_load_loss(logits, noisy, std, num_chosen=3) == 0


def test_logprob_of_an_ordered_choice_equals_the_loop_and_sums_to_one() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 4)
    pairs = torch.tensor([[i, j] for i in range(4) for j in range(4) if i != j])
    for row in logits:
        logprobs = ordered_choice_logprob(row.expand(len(pairs), 4), pairs)
        torch.testing.assert_close(logprobs.exp().sum(), torch.tensor(1.0))
        expected = torch.tensor([drawing_logprob(row, pair) for pair in pairs.tolist()])
        torch.testing.assert_close(logprobs, expected)


def test_routing_policy_loss_by_hand() -> None:
    losses = torch.tensor([2.0, 0.5], requires_grad=True)
    logprobs = torch.tensor([[-1.0, -0.5], [-2.0, -0.25]], requires_grad=True)
    baselines = torch.tensor([[1.5, 2.0], [1.0, 0.5]], requires_grad=True)
    # Gaps [[0.5, 0], [-0.5, 0]]: 0.5 * -1 + 0.125, and -0.5 * -2 + 0.125.
    total = routing_policy_loss(losses, logprobs, baselines)
    torch.testing.assert_close(total, torch.tensor([-0.375, 1.125]))
    total.sum().backward()
    assert losses.grad is None
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.5, 0.0], [-0.5, 0.0]]))
    torch.testing.assert_close(baselines.grad, torch.tensor([[-0.5, 0.0], [0.5, 0.0]]))


def test_policy_loss_is_an_unbiased_estimate_of_the_gradient_of_the_expected_loss() -> None:
    """The sum over all choices of probability times estimate is the gradient of sum_i p_i cost_i, for any baseline."""
    logits, costs = torch.tensor([0.3, -0.2, 0.9], requires_grad=True), torch.tensor([1.0, 3.0, -2.0])
    (logits.softmax(0) * costs).sum().backward()
    expected, estimate = logits.grad, torch.zeros(3)
    probs = logits.detach().softmax(0)
    for choice in range(3):
        copy = logits.detach().clone().requires_grad_()
        logprob = ordered_choice_logprob(copy[None], torch.tensor([[choice]]))
        routing_policy_loss(costs[choice : choice + 1], logprob[:, None], torch.full((1, 1), 0.7)).sum().backward()
        assert copy.grad is not None
        estimate += probs[choice] * copy.grad
    torch.testing.assert_close(estimate, expected)


@pytest.mark.parametrize("loss", [group_balance_loss, communication_balance_loss])
def test_group_losses_are_sums_over_tokens(loss: object) -> None:
    torch.manual_seed(0)
    logits, constant = torch.randn(6, 4), torch.tensor([0.4, 0.1, 0.3, 0.2])
    options = {"num_groups": 2} if loss is group_balance_loss else {"max_groups": 1}
    constant = constant if loss is group_balance_loss else constant[:2]
    whole, parts = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss(whole.softmax(-1), constant, **options).sum().backward()  # type: ignore[operator]
    for piece in parts.split([2, 4]):
        loss(piece.softmax(-1), constant, **options).sum().backward()  # type: ignore[operator]
    torch.testing.assert_close(whole.grad, parts.grad)

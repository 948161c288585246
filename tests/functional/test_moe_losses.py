"""Router losses and the balancing bias against values worked out by hand."""

import math

import torch

from alignlab.functional.moe_losses import router_bias_update, router_z_loss, switch_balance_loss


def test_balance_loss_of_two_tokens() -> None:
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]])
    load = torch.tensor([0.5, 0.3, 0.2])
    # 3 * (0.25 + 0.075 + 0.05) = 1.125 and 3 * 0.2 = 0.6
    torch.testing.assert_close(switch_balance_loss(probs, load), torch.tensor([1.125, 0.6]))


def test_balance_loss_is_one_at_even_load_and_pushes_towards_idle_experts() -> None:
    logits = torch.zeros(4, 3, requires_grad=True)
    torch.testing.assert_close(switch_balance_loss(logits.softmax(-1), torch.full((3,), 1 / 3)), torch.ones(4))
    switch_balance_loss(logits.softmax(-1), torch.tensor([0.8, 0.1, 0.1])).sum().backward()
    assert logits.grad is not None
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


def test_balance_loss_is_a_sum_over_tokens_so_any_split_gives_the_same_gradient() -> None:
    torch.manual_seed(0)
    logits, load = torch.randn(7, 4), torch.tensor([0.4, 0.3, 0.2, 0.1])
    whole, parts = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    switch_balance_loss(whole.softmax(-1), load).sum().backward()
    for piece in parts.split([1, 4, 2]):
        switch_balance_loss(piece.softmax(-1), load).sum().backward()
    torch.testing.assert_close(whole.grad, parts.grad)


def test_z_loss() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    torch.testing.assert_close(router_z_loss(logits), torch.tensor([math.log(2.0) ** 2, math.log(4.0) ** 2]))


def test_bias_rises_for_idle_experts_and_falls_for_busy_ones() -> None:
    bias = torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.0, 0.0]])
    counts = torch.tensor([[9, 1, 5], [2, 2, 2]])
    expected = torch.tensor([[-0.1, 0.6, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(router_bias_update(bias, counts, rate=0.1), expected)

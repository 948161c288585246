import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignlab.functional import policy_losses, reduction
from tests.reference import functional as twin

CLIP = dict(clip_low=0.2, clip_high=0.28)
values = st.floats(-2, 2)
cases = st.integers(1, 6).flatmap(lambda n: st.tuples(*[st.lists(values, min_size=n, max_size=n) for _ in range(3)]))


def tensors(*lists):
    return [torch.tensor(values, dtype=torch.float64) for values in lists]


def gspo(logprobs, old, advantages, *, sequence_ids=None, mask=None, num_sequences=1, **clip):
    count = len(logprobs)
    return policy_losses.gspo_clip(
        logprobs, old, advantages,
        mask=torch.ones(count, dtype=torch.bool) if mask is None else mask,
        sequence_ids=torch.zeros(count, dtype=torch.long) if sequence_ids is None else sequence_ids,
        num_sequences=num_sequences, **(clip or CLIP),
    )  # fmt: skip


def test_ppo_by_hand():
    """Clipped above, clipped below, and the two unclipped sides."""
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5])
    advantages = torch.tensor([2.0, -2.0, -2.0, 2.0])
    loss, returned = policy_losses.ppo_clip(ratio.log(), torch.zeros(4), advantages, **CLIP)
    torch.testing.assert_close(returned, ratio)
    torch.testing.assert_close(loss, torch.tensor([-2.56, 1.6, 3.0, -1.0]))


def test_ppo_gradient_stops_exactly_where_the_clip_acts():
    logprobs = torch.tensor([1.5, 0.5, 1.5, 0.5]).log().requires_grad_()
    advantages = torch.tensor([2.0, -2.0, -2.0, 2.0])
    policy_losses.ppo_clip(logprobs, torch.zeros(4), advantages, **CLIP)[0].sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 0.0, 3.0, -1.0]))


def test_dual_clip_by_hand():
    """Bounds only bad tokens that became likelier, and stops their gradient."""
    logprobs = torch.tensor([5.0, 2.0, 5.0]).log().requires_grad_()
    advantages = torch.tensor([-1.0, -1.0, 1.0])
    loss, _ = policy_losses.ppo_clip(logprobs, torch.zeros(3), advantages, **CLIP, dual_clip=3.0)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([3.0, 2.0, -1.28]))
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 2.0, 0.0]))


@given(cases, st.sampled_from([None, 1.5]))
def test_ppo_equals_the_slow_twin(case, dual_clip):
    logprobs, old, advantages = case
    loss, _ = policy_losses.ppo_clip(*tensors(*case), **CLIP, dual_clip=dual_clip)
    expected = [twin.ppo_clip(*row, 0.2, 0.28, dual_clip) for row in zip(logprobs, old, advantages, strict=True)]
    assert loss.tolist() == pytest.approx(expected)


@given(cases)
def test_gspo_equals_the_slow_twin(case):
    logprobs, old, advantages = case
    ids = [i % 2 for i in range(len(logprobs))]
    mask = [i < 2 or i % 3 > 0 for i in range(len(logprobs))]
    loss, ratio = gspo(
        *tensors(*case), sequence_ids=torch.tensor(ids), mask=torch.tensor(mask), num_sequences=2, **CLIP
    )
    for t, sequence in enumerate(ids):
        expected = twin.sequence_ratio(logprobs, old, mask, ids, sequence)
        assert ratio[t].item() == pytest.approx(expected)
        assert loss[t].item() == pytest.approx(twin.ppo_clip(math.log(expected), 0.0, advantages[t], 0.2, 0.28))


def test_gspo_gradient_runs_through_the_sequence_ratio():
    """d/d logprobs[t] of the sequence mean = -s * A / length on each of its tokens, whatever the token's own ratio."""
    logprobs, old, advantages = tensors([-1.0, -2.0, -0.5], [-1.1, -1.8, -0.6], [0.7, 0.7, -1.0])
    logprobs.requires_grad_()
    ids, mask = torch.tensor([0, 0, 1]), torch.ones(3, dtype=torch.bool)
    loss, ratio = gspo(logprobs, old, advantages, sequence_ids=ids, num_sequences=2, **CLIP)
    weights = reduction.sequence_mean_weights(mask, ids, torch.tensor([2, 1]), num_sequences=2)
    (loss * weights).sum().backward()
    s = [math.exp((0.1 - 0.2) / 2), math.exp(0.1)]
    assert ratio.tolist() == pytest.approx([s[0], s[0], s[1]])
    assert logprobs.grad.tolist() == pytest.approx([-s[0] * 0.7 / 4, -s[0] * 0.7 / 4, s[1] / 2])


def test_gspo_gradient_is_that_of_its_token_level_form():
    logprobs, old = tensors([-1.0, -2.0, -0.5, -0.3], [-1.1, -1.8, -0.6, -0.3])
    advantages = torch.full((4,), 0.7, dtype=torch.float64)
    logprobs.requires_grad_()
    gspo(logprobs, old, advantages)[0].sum().backward()
    tokens = logprobs.detach().clone().requires_grad_()
    ratio = (logprobs - old).mean().exp().detach() * (tokens - tokens.detach()).exp()
    (-torch.minimum(ratio, ratio.clamp(0.8, 1.28)) * advantages).sum().backward()
    torch.testing.assert_close(logprobs.grad, tokens.grad)


def test_gspo_clips_a_sequence_as_a_whole_and_leaves_prompts_alone():
    logprobs = torch.tensor([9.0, 0.5, 0.3, 0.0]).requires_grad_()
    ids, mask = torch.tensor([-1, 0, 0, 1]), torch.tensor([False, True, True, True])
    loss, ratio = gspo(logprobs, torch.zeros(4), torch.ones(4), sequence_ids=ids, mask=mask, num_sequences=3, **CLIP)
    (loss * mask).sum().backward()
    torch.testing.assert_close(ratio, torch.tensor([1.0, math.exp(0.4), math.exp(0.4), 1.0]))
    assert logprobs.grad.tolist() == [0.0, 0.0, 0.0, -1.0]


def test_cispo_by_hand():
    """The bound is 1 + high; a clipped token keeps its gradient; there is no bound below."""
    logprobs = torch.tensor([math.log(0.9), math.log(0.5), math.log(0.1)]).requires_grad_()
    old = torch.tensor([math.log(0.3), math.log(0.5), math.log(0.5)])
    advantages = torch.tensor([2.0, -1.0, 1.0])
    loss, ratio = policy_losses.cispo(logprobs, old, advantages, clip_high=0.2)
    loss.sum().backward()
    torch.testing.assert_close(ratio.detach(), torch.tensor([3.0, 1.0, 0.2]))
    torch.testing.assert_close(logprobs.grad, torch.tensor([-2.4, 1.0, -0.2]))
    torch.testing.assert_close(loss.detach(), torch.tensor([-2.4 * math.log(0.9), math.log(0.5), -0.2 * math.log(0.1)]))


def test_reinforce_by_hand():
    logprobs = torch.tensor([-0.5, -2.0]).requires_grad_()
    loss, ratio = policy_losses.reinforce(logprobs, torch.tensor([3.0, -1.0]))
    loss.sum().backward()
    assert loss.tolist() == [1.5, -2.0]
    assert ratio.tolist() == [1.0, 1.0]
    assert logprobs.grad.tolist() == [-3.0, 1.0]


@given(cases)
def test_at_ratio_one_every_surrogate_has_the_policy_gradient(case):
    """The first update: old = policy. For GSPO, with one advantage a sequence."""
    logprobs, _, advantages = tensors(*case)

    def gradient(surrogate, advantages):
        leaf = logprobs.clone().requires_grad_()
        surrogate(leaf, logprobs, advantages)[0].sum().backward()
        return leaf.grad

    torch.testing.assert_close(gradient(lambda lp, old, a: policy_losses.reinforce(lp, a), advantages), -advantages)
    for surrogate in (
        lambda lp, old, a: policy_losses.ppo_clip(lp, old, a, **CLIP),
        lambda lp, old, a: policy_losses.ppo_clip(lp, old, a, **CLIP, dual_clip=3.0),
        lambda lp, old, a: policy_losses.cispo(lp, old, a, clip_high=0.2),
    ):
        torch.testing.assert_close(gradient(surrogate, advantages), -advantages)
    same = advantages[:1].expand_as(advantages)
    torch.testing.assert_close(gradient(gspo, same), -same)


def test_gspo_of_one_token_sequences_is_ppo():
    logprobs, old, advantages = tensors([-1.0, -0.2, -3.0], [-1.5, -0.1, -1.0], [1.0, -1.0, 2.0])
    ours = gspo(logprobs, old, advantages, sequence_ids=torch.arange(3), num_sequences=3, **CLIP)
    torch.testing.assert_close(ours, policy_losses.ppo_clip(logprobs, old, advantages, **CLIP))


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_huge_ratio_stays_finite(advantage):
    logprobs = torch.tensor([0.0]).requires_grad_()
    for surrogate in (policy_losses.ppo_clip, gspo):
        loss, ratio = surrogate(logprobs, torch.tensor([-500.0]), torch.tensor([advantage]), **CLIP)
        loss.sum().backward()
        assert ratio.item() == pytest.approx(math.exp(20))
        assert loss.isfinite().all()
        assert logprobs.grad.tolist() == [0.0]


def test_old_logprobs_get_no_gradient_and_half_precision_becomes_float32():
    logprobs = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    old = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    advantages = torch.ones(2, dtype=torch.bfloat16)
    for loss, _ in (
        policy_losses.ppo_clip(logprobs, old, advantages, **CLIP),
        policy_losses.cispo(logprobs, old, advantages, clip_high=0.2),
        gspo(logprobs, old, advantages),
        policy_losses.reinforce(logprobs, advantages),
    ):
        assert loss.dtype == torch.float32
        loss.sum().backward()
    assert old.grad is None


def test_clip_acts_by_hand():
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1, 0.9])
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0])
    assert policy_losses.clip_acts(ratio, advantages, **CLIP).tolist() == [True, True, False, False, False, False]
    logprobs = ratio.log().requires_grad_()
    policy_losses.ppo_clip(logprobs, torch.zeros(6), advantages, **CLIP)[0].sum().backward()
    assert (logprobs.grad == 0).tolist() == [True, True, False, False, False, False]

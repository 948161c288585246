"""Routers that balance by themselves or learn by REINFORCE, and balance losses, against slow twins and by hand."""

from __future__ import annotations

import pytest
import torch

from alignlab.models.moe import expert_counts, routers, take_loads
from alignlab.models.routers.auction import RELATIVE_PRECISION, balanced_assignment
from alignlab.models.routers.coded import experts_of
from alignlab.models.routers.protocol import NOTHING_KNOWN, RouterScores
from alignlab.models.routers.sinkhorn import log_transport_plan
from alignlab.models.routing import RoutingRecord
from tests.models.routers_cases import ROUTERS, TRAINS, layer, model, scores_of, states, weight_gradients
from tests.reference.routers import (
    best_assignment,
    drawing_logprob,
    sequence_balance,
    taken_by_experts,
    transport_plan,
)

# BASE and sinkhorn.


def test_balanced_assignment_is_the_best_one_and_balanced() -> None:
    torch.manual_seed(0)
    for _ in range(5):
        scores = torch.randn(7, 3) + 2 * torch.randn(3)
        experts = balanced_assignment(scores)
        assert experts.bincount(minlength=3).max() <= 3
        total = float(scores.gather(1, experts[:, None]).sum())
        slack = 9 * RELATIVE_PRECISION * float(scores.max() - scores.min())
        assert best_assignment(scores, 3) - slack <= total <= best_assignment(scores, 3) + 1e-5


def test_balanced_assignment_by_hand() -> None:
    """Both tokens prefer expert 0; the one that loses less goes to expert 1."""
    assert balanced_assignment(torch.tensor([[3.0, 0.0], [5.0, 4.0]])).tolist() == [0, 1]


@pytest.mark.parametrize("scores", [torch.zeros(8, 4), torch.full((5, 2), torch.nan), torch.ones(3, 1)])
def test_balanced_assignment_ends_with_equal_missing_or_single_scores(scores: torch.Tensor) -> None:
    num_tokens, num_experts = scores.shape
    counts = balanced_assignment(scores).bincount(minlength=num_experts)
    assert counts.sum() == num_tokens and counts.max() <= -(-num_tokens // num_experts)


def test_base_is_balanced_in_training_and_greedy_otherwise() -> None:
    module = layer(**ROUTERS["base"])
    scores = scores_of(module, 36)
    balanced = module.gate.choose(scores, TRAINS)
    assert balanced.flatten().bincount(minlength=6).tolist() == [6] * 6
    greedy = module.gate.choose(scores, NOTHING_KNOWN)
    assert torch.equal(greedy, scores.logits.argmax(-1, keepdim=True)) and not torch.equal(greedy, balanced)
    torch.testing.assert_close(
        module.gate.gates(scores, balanced), scores.logits.gather(1, balanced).sigmoid()
    )
    module.gate.explores = False
    assert torch.equal(module.gate.choose(scores, TRAINS), greedy)


def test_transport_plan_equals_the_loop_and_balances() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(30, 5) + torch.randn(5)
    plan = log_transport_plan(logits, num_rounds=4).exp()
    torch.testing.assert_close(plan, transport_plan(logits, 4))
    torch.testing.assert_close(plan.sum(1), torch.ones(30, dtype=torch.float64))
    far = log_transport_plan(logits, num_rounds=200).exp()
    torch.testing.assert_close(far.sum(0), torch.full((5,), 6.0, dtype=torch.float64), rtol=1e-3, atol=1e-3)


def test_sinkhorn_is_more_even_in_training_and_greedy_otherwise() -> None:
    module = layer(router_type="sinkhorn", num_experts_per_tok=1)
    scores = scores_of(module, 60)
    skewed = RouterScores(scores.logits + torch.arange(6.0), scores.scores)
    even, greedy = (module.gate.choose(skewed, routed).flatten() for routed in (TRAINS, NOTHING_KNOWN))
    assert torch.equal(greedy, skewed.logits.argmax(-1))
    assert even.bincount(minlength=6).max() < 20 < greedy.bincount(minlength=6).max()


# Expert choice.


def test_expert_choice_equals_the_loop_and_is_balanced() -> None:
    module = layer(**ROUTERS["expert_choice"])
    scores = scores_of(module)
    choices = module.gate.choose(scores, NOTHING_KNOWN)
    takes = taken_by_experts(scores.scores, 14)  # 40 * 2 / 6, rounded up
    assert torch.equal(choices >= 0, takes) and torch.equal(experts_of(choices), torch.arange(6).expand(40, 6))
    torch.testing.assert_close(module.gate.gates(scores, choices), scores.scores * takes)
    module.gate.count(choices)
    assert module.gate.counts().tolist() == [14] * 6
    assert len(set(takes.sum(1).tolist())) > 1


def test_expert_choice_lets_later_tokens_decide_for_earlier_ones() -> None:
    """The reason why rollouts and comparisons of log-probs refuse it."""
    lm = model(**ROUTERS["expert_choice"])
    ids = torch.arange(18)
    first, other = RoutingRecord(), RoutingRecord()
    states(lm, ids, first)
    states(lm, torch.cat([ids[:12], ids[12:] + 7]), other)
    assert not torch.equal(first.stacked_choices()[:12], other.stacked_choices()[:12])


# REINFORCE.


def test_draws_have_the_probabilities_of_the_softmax() -> None:
    module = layer(**ROUTERS["reinforce"], num_experts_per_tok=1)
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, 0.2, -0.3])
    scores = RouterScores(logits.expand(20000, 6), logits.softmax(0).expand(20000, 6))
    drawn = module.gate.choose(scores, TRAINS).flatten().bincount(minlength=6) / 20000
    # Of 20,000 draws a frequency has a standard deviation of at most 0.0035; those of -logits are 0.3 away.
    torch.testing.assert_close(drawn, logits.softmax(0), rtol=0.0, atol=0.012)
    assert (module.gate.choose(scores, NOTHING_KNOWN) == 1).all()


def test_the_policy_says_how_likely_the_choices_were_in_their_order() -> None:
    module = layer(**ROUTERS["reinforce"])
    scores = scores_of(module, 12, TRAINS)
    choices = module.gate.choose(scores, TRAINS)
    expected = [drawing_logprob(row, experts) for row, experts in zip(scores.logits, choices.tolist(), strict=True)]
    torch.testing.assert_close(module.gate.policy(scores, choices).logprobs, torch.tensor(expected))


def test_a_router_of_one_normalised_expert_is_learnt_by_reinforce_alone() -> None:
    """The gate is 1 whatever the router says; the policy's log-probability carries its whole gradient."""
    lm = model(**ROUTERS["reinforce"], num_experts_per_tok=1).train()
    record = RoutingRecord()
    output = states(lm, torch.arange(18), record)
    gradients = weight_gradients(lm, output)
    assert gradients["model.layers.2.mlp.gate.weight"].abs().max() == 0
    record = RoutingRecord()
    states(lm, torch.arange(18), record)
    policy = record.policy()
    assert policy is not None and policy.logprobs.shape == policy.baselines.shape == (18, 2)
    gradients = weight_gradients(lm, policy.logprobs)
    assert gradients["model.layers.2.mlp.gate.weight"].abs().max() > 1e-3


# Balance.


def test_sequence_balance_is_of_the_segments_of_a_pack_and_of_rows_without_one() -> None:
    lm = model(router_seq_aux_loss_coef=0.5, mlp_layer_types=["sparse", "dense", "dense"]).train()
    seen: dict[str, RouterScores] = {}
    lm.model.layers[0].mlp.gate.register_forward_hook(lambda _, inputs, output: seen.update(scores=output))
    counted = torch.tensor([False] * 5 + [True] * 13)
    record = RoutingRecord(counted=counted)
    states(lm, torch.arange(18), record)
    sequences = [[5, 6], [7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17]]
    loss = record.total_loss()
    assert loss is not None
    torch.testing.assert_close(loss, 0.5 * sequence_balance(seen["scores"].scores, sequences, 2))
    record = RoutingRecord()
    lm(torch.arange(12).view(3, 4), routing=record, use_cache=False)
    rows = sequence_balance(seen["scores"].scores, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]], 2)
    loss = record.total_loss()
    assert loss is not None
    torch.testing.assert_close(loss, 0.5 * rows)


def test_communication_balance_counts_the_tokens_sent_to_each_group() -> None:
    lm = model(**ROUTERS["groups_v2"], router_comm_aux_loss_coef=0.5, router_device_aux_loss_coef=0.25).train()
    record = RoutingRecord(counted=torch.arange(18) > 4)
    states(lm, torch.arange(18), record)
    counts = expert_counts(lm)
    assert counts.shape == (2, 9)
    chosen = record.chosen[0][5:] // 2
    sent = torch.tensor([int((chosen == group).any(1).sum()) for group in range(3)])
    assert torch.equal(counts[0, 6:], sent)
    take_loads(lm, counts)
    router = routers(lm)[0]
    torch.testing.assert_close(router.group_load, sent / 13)
    scores = router(torch.randn(4, 16), NOTHING_KNOWN)
    by_group = scores.scores.unflatten(1, (3, 2)).sum(-1)
    load = router.expert_load.view(3, 2).mean(1) * 6
    torch.testing.assert_close(
        router.losses(scores, NOTHING_KNOWN), 0.25 * by_group @ load + 0.5 * by_group @ (3 / 2 * sent / 13)
    )

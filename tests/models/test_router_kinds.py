"""Each router by itself, against its slow twin, `transformers` and values worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, DeepseekV4Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter

from alignlab.errors import ConfigError
from alignlab.models.moe import expert_counts, routers, take_loads
from alignlab.models.routers.capacity import expert_capacity, within_capacity
from alignlab.models.routers.coded import experts_of
from alignlab.models.routers.hashed import balanced_table, random_table
from alignlab.models.routers.noise import gumbel_noise, normal_noise
from alignlab.models.routers.protocol import NOTHING_KNOWN, RoutedTokens
from alignlab.models.routers.topk import in_best_groups
from alignlab.models.routing import RoutingRecord
from alignlab.types import Segments
from tests.models.routers_cases import ROUTERS, SEGMENTS, TRAINS, layer, model, scores_of, states, weight_gradients
from tests.reference.moe import mixture
from tests.reference.routers import (
    in_groups,
    with_room,
)

# Groups of experts.


@pytest.mark.parametrize("num_best", [1, 2])
def test_best_groups_equal_the_loop_with_negative_scores_too(num_best: int) -> None:
    torch.manual_seed(0)
    ranked = torch.randn(60, 8) - 2
    ours = in_best_groups(ranked, num_groups=4, max_groups=2, num_best=num_best).topk(3, dim=-1).indices
    assert [set(row) for row in ours.tolist()] == in_groups(ranked, 4, 2, num_best, 3)


def test_group_score_is_of_the_best_or_of_the_two_best() -> None:
    ranked = torch.tensor([[0.9, 0.0, 0.5, 0.6]])
    assert in_best_groups(ranked, num_groups=2, max_groups=1, num_best=1).tolist()[0][2:] == [-torch.inf] * 2
    assert in_best_groups(ranked, num_groups=2, max_groups=1, num_best=2).tolist()[0][:2] == [-torch.inf] * 2


def deepseek(config_class: Any, **changes: Any) -> Any:
    return config_class(
        hidden_size=16, n_routed_experts=8, num_local_experts=8, num_experts=8, num_experts_per_tok=3, n_group=4,
        topk_group=2, routed_scaling_factor=2.5, vocab_size=32, num_attention_heads=2, **changes,
    )


@pytest.mark.parametrize("offset", [0.0, -2.0])
def test_parity_with_deepseek_v3(offset: float) -> None:
    module = layer(
        num_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, topk_method="noaux_tc", scoring_func="sigmoid",
        routed_scaling_factor=2.5, router_bias_update_rate=0.1,
    )
    theirs = DeepseekV3TopkRouter(deepseek(DeepseekV3Config))
    torch.manual_seed(3)
    bias = torch.randn(8) * 0.1 + offset
    theirs.weight.data.copy_(module.gate.weight)
    theirs.e_score_correction_bias.copy_(bias)
    module.gate.e_score_correction_bias.copy_(bias)
    hidden = torch.randn(300, 16)
    _, weights, indices = theirs(hidden)
    scores = module.gate(hidden, NOTHING_KNOWN)
    assert torch.equal(module.gate.choose(scores, NOTHING_KNOWN).sort(-1).values, indices.sort(-1).values)
    torch.testing.assert_close(module.gate.gates(scores, indices), weights)


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_parity_with_deepseek_v2(method: str) -> None:
    module = layer(
        num_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, topk_method=method, norm_topk_prob=False,
        routed_scaling_factor=2.5,
    )
    theirs = DeepseekV2TopkRouter(deepseek(DeepseekV2Config, topk_method=method))
    theirs.weight.data.copy_(module.gate.weight)
    hidden = torch.randn(300, 16)
    _, weights, indices = theirs(hidden)
    scores = module.gate(hidden, NOTHING_KNOWN)
    assert torch.equal(module.gate.choose(scores, NOTHING_KNOWN).sort(-1).values, indices.sort(-1).values)
    torch.testing.assert_close(module.gate.gates(scores, indices), weights)


# Capacity.


def test_capacity_is_rounded_up_from_one_to_all_tokens() -> None:
    sizes = [
        expert_capacity(tokens, num_chosen=2, num_experts=6, factor=factor)
        for tokens, factor in ((12, 1.0), (13, 1.0), (12, 1.25), (1, 0.1), (3, 100.0))
    ]
    assert sizes == [4, 5, 5, 1, 3]


def test_first_choices_come_before_second_ones_and_scores_may_decide() -> None:
    experts = torch.tensor([[0, 1], [1, 0], [0, 1]])
    scores = torch.tensor([[0.5, 0.3], [0.6, 0.4], [0.9, 0.1]])
    by_order = within_capacity(experts, scores, num_experts=2, capacity=2, by_score=False)
    # Expert 0: tokens 0 and 2 first, so token 1's second choice is dropped. Expert 1: token 1, then token 0.
    assert by_order.tolist() == [[True, True], [True, False], [True, False]]
    one = within_capacity(experts, scores, num_experts=2, capacity=1, by_score=True)
    assert one.tolist() == [[False, False], [True, False], [True, False]]


@pytest.mark.parametrize("by_score", [False, True])
@pytest.mark.parametrize("num_chosen", [1, 3])
def test_capacity_equals_the_loop(by_score: bool, num_chosen: int) -> None:
    torch.manual_seed(0)
    scores, experts = (torch.randn(50, 6) + torch.randn(6)).topk(num_chosen, dim=-1)
    for capacity in (1, 5, 20):
        ours = within_capacity(experts, scores, num_experts=6, capacity=capacity, by_score=by_score)
        assert torch.equal(ours, with_room(experts, scores, capacity, by_score=by_score))


def test_a_router_drops_what_has_no_room_and_counts_it() -> None:
    module = layer(**ROUTERS["by_order"])
    scores = scores_of(module)
    choices = module.gate.choose(scores, NOTHING_KNOWN)
    best = scores.scores.topk(2, dim=-1)
    expected = with_room(best.indices, best.values, 10, by_score=False)
    assert torch.equal(choices >= 0, expected) and torch.equal(experts_of(choices), best.indices)
    assert 0.2 < float((choices < 0).float().mean()) < 0.8


@pytest.mark.parametrize("name", ["by_order", "by_score", "expert_choice"])
def test_gradients_with_dropped_choices_equal_the_loop(name: str) -> None:
    """A dropped choice adds nothing to any gradient; what grouped products leave in its rows is never read."""
    module = layer(**ROUTERS[name])
    x = torch.randn(30, 16, requires_grad=True)
    scores = module.gate(x, NOTHING_KNOWN)
    choices = module.gate.choose(scores, NOTHING_KNOWN)
    gates = module.gate.gates(scores, choices)
    assert (choices < 0).any()
    experts = (module.experts.gate_up_proj, module.experts.down_proj)
    reference = mixture(x, *experts, experts_of(choices), gates)
    output = module(x)
    torch.testing.assert_close(output, reference, rtol=1e-4, atol=1e-5)
    weight = torch.linspace(-1, 1, output.numel()).view_as(output)
    inputs = [x, *experts, module.gate.weight]
    ours = torch.autograd.grad((output * weight).sum(), inputs)
    theirs = torch.autograd.grad((reference * weight).sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# Noise.


def test_noise_is_normal_and_differs_by_expert_key_and_position() -> None:
    key = torch.tensor(12345)
    noise = normal_noise(NOTHING_KNOWN, key, num_tokens=5000, num_experts=8)
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.var()) - 1) < 0.02
    assert float(torch.corrcoef(noise.t()).fill_diagonal_(0).abs().max()) < 0.06
    assert abs(float(torch.corrcoef(torch.stack([noise[1:, 0], noise[:-1, 0]]))[0, 1])) < 0.06
    assert float((noise - normal_noise(NOTHING_KNOWN, key + 1, num_tokens=5000, num_experts=8)).abs().mean()) > 0.5
    gumbel = gumbel_noise(NOTHING_KNOWN, key, num_tokens=20000, num_experts=1)
    assert abs(float(gumbel.mean()) - 0.5772) < 0.03


def test_noise_of_a_token_does_not_depend_on_its_pack() -> None:
    key, ids = torch.tensor(7), torch.arange(18)
    whole = normal_noise(RoutedTokens(ids, SEGMENTS), key, num_tokens=18, num_experts=4)
    first = Segments((4, 5), (-1, 0), (-1, 1), (0, 0))  # the prompt with its second completion
    parts = torch.cat([ids[:4], ids[7:12]])
    ours = normal_noise(RoutedTokens(parts, first), key, num_tokens=9, num_experts=4)
    assert torch.equal(ours, torch.cat([whole[:4], whole[7:12]]))
    other = normal_noise(RoutedTokens(ids[12:], Segments((6,), (-1,), (2,), (1,))), key, num_tokens=6, num_experts=4)
    assert torch.equal(other, whole[12:])


def test_noise_has_the_learnt_size_in_training_alone() -> None:
    module = layer(router_type="noisy_topk")
    module.gate.noise_key.fill_(3)
    plain, noisy = scores_of(module), scores_of(module, routed=TRAINS)
    assert plain.noise_std is None and torch.equal(plain.logits, noisy.clean_logits)
    torch.manual_seed(2)
    std = torch.nn.functional.softplus(torch.randn(40, 16) @ module.gate.noise_weight.t())
    noise = normal_noise(TRAINS, torch.tensor(3), num_tokens=40, num_experts=6)
    torch.testing.assert_close(noisy.logits, plain.logits + noise * std)
    chosen = module.gate.choose(noisy, TRAINS)
    assert torch.equal(chosen, noisy.logits.topk(2, dim=-1).indices)
    assert not torch.equal(chosen, module.gate.choose(plain, NOTHING_KNOWN))


def test_noise_is_new_at_each_step_and_off_where_choices_are_replayed_or_compared() -> None:
    lm = model(router_type="noisy_topk").train()
    ids = torch.arange(18) % 32

    def chosen() -> torch.Tensor:
        record = RoutingRecord()
        states(lm, ids, record)
        return record.stacked_choices()

    first = chosen()
    assert torch.equal(chosen(), first)
    take_loads(lm, expert_counts(lm))
    assert not torch.equal(chosen(), first)
    for router in routers(lm):
        router.explores = False
    quiet = chosen()
    record = RoutingRecord()
    states(lm.eval(), ids, record)
    assert torch.equal(record.stacked_choices(), quiet) and not torch.equal(quiet, first)


def test_noise_gives_its_size_a_gradient() -> None:
    lm = model(router_type="noisy_topk", router_importance_loss_coef=0.1, router_load_loss_coef=0.1).train()
    record = RoutingRecord(counted=torch.arange(18) > 3)
    states(lm, torch.arange(18), record)
    loss = record.total_loss()
    assert loss is not None
    gradients = weight_gradients(lm, loss[:1])  # alike for all tokens
    assert gradients["model.layers.0.mlp.gate.noise_weight"].abs().max() > 1e-5


# Hash.


def test_parity_with_deepseek_v4_hash_routing() -> None:
    module = layer(router_type="hash", scoring_func="sqrtsoftplus", routed_scaling_factor=1.5)
    config = DeepseekV4Config(
        hidden_size=16, n_routed_experts=6, num_experts_per_tok=2, vocab_size=32, routed_scaling_factor=1.5,
        scoring_func="sqrtsoftplus",
    )
    theirs = DeepseekV4HashRouter(config)
    table = random_table(module.gate.config)
    theirs.weight.data.copy_(module.gate.weight)
    theirs.tid2eid.copy_(table)
    module.gate.tid2eid.copy_(table)
    hidden, ids = torch.randn(20, 16), torch.randint(0, 32, (20,))
    _, weights, indices = theirs(hidden, ids)
    routed = RoutedTokens(ids)
    scores = module.gate(hidden, routed)
    choices = module.gate.choose(scores, routed)
    assert torch.equal(choices, indices)
    torch.testing.assert_close(module.gate.gates(scores, choices), weights)


def test_a_new_hash_table_uses_all_experts_alike_and_no_expert_twice() -> None:
    lm = model(router_type="hash", num_experts_per_tok=3)
    tables = [router.tid2eid for router in routers(lm)]
    assert not torch.equal(*tables)
    for table in tables:
        assert all(len(set(row)) == 3 for row in table.tolist())
        used = table[:, 0].bincount(minlength=6)
        assert used.max() - used.min() <= 1


def test_balanced_table_gives_the_most_frequent_ids_to_different_experts() -> None:
    table = balanced_table(torch.tensor([5, 1, 9, 3, 0]), num_experts=3, num_chosen=1)
    # 9 -> expert 0, 5 -> expert 1, 3 -> expert 2, 1 -> expert 2 (3 is the least), 0 -> expert 2 (4 is the least)
    assert table[:, 0].tolist() == [1, 2, 0, 2, 2]


def test_hash_routing_needs_token_ids() -> None:
    lm = model(router_type="hash")
    with pytest.raises(ConfigError, match="inputs_embeds without input_ids"):
        lm(inputs_embeds=torch.randn(1, 5, 16))

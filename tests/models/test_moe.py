"""Routers, grouped experts and the routing record against a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.models.config import PolicyConfig
from alignlab.models.moe import (
    SparseFeedForward,
    expert_counts,
    move_biases,
    take_loads,
)
from alignlab.models.routers.protocol import RoutedTokens, Router, RouterScores
from alignlab.models.routing import RoutingRecord
from alignlab.models.transformer import PolicyForCausalLM
from tests.reference.moe import mixture, route

SHAPE: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "initializer_range": 0.5,
}
ROUTERS = [
    {"scoring_func": scoring, "norm_topk_prob": normalise, "routed_scaling_factor": scale}
    for scoring in ("softmax", "sigmoid") for normalise in (True, False) for scale in (1.0, 2.5)
]


def layer(**changes: Any) -> SparseFeedForward:
    """One sparse feed-forward with random weights."""
    torch.manual_seed(0)
    module = SparseFeedForward(PolicyConfig(**{**SHAPE, **changes}), 0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def model(**changes: Any) -> PolicyForCausalLM:
    torch.manual_seed(0)
    return PolicyForCausalLM(PolicyConfig(**{**SHAPE, "mlp_layer_types": ["sparse", "dense", "sparse"], **changes}))


def expected(module: SparseFeedForward, x: Tensor, replay: Tensor | None = None) -> tuple[Tensor, Tensor]:
    config = module.gate.config
    choices, gates = route(
        x @ module.gate.weight.t(), config.num_experts_per_tok, scoring=config.scoring_func,
        normalise=config.norm_topk_prob, scale=config.routed_scaling_factor,
        bias=module.gate.e_score_correction_bias, replay=replay,
    )
    return mixture(x, module.experts.gate_up_proj, module.experts.down_proj, choices, gates), choices


def gradients(module: torch.nn.Module, x: Tensor, output: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 1, output.numel()).view_as(output).to(output)
    return list(torch.autograd.grad((output * weight).sum(), [x, *module.parameters()]))


@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: "-".join(str(value) for value in r.values()))
def test_sparse_layer_equals_the_loop_in_values_and_gradients(router: dict[str, Any]) -> None:
    module = layer(**router)
    x = torch.randn(11, 16, requires_grad=True)
    output, (reference, _) = module(x), expected(module, x)
    torch.testing.assert_close(output, reference, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients(module, x, output), gradients(module, x, reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_experts_without_a_token_get_no_gradient_and_the_others_theirs() -> None:
    module, x = layer(), torch.randn(3, 16, requires_grad=True)
    ids = torch.tensor([[0, 5], [5, 2], [2, 0]])
    weights = torch.rand(3, 2, requires_grad=True)
    stacked = (module.experts.gate_up_proj, module.experts.down_proj)
    ours = torch.autograd.grad(module.experts(x, ids, weights).square().sum(), [x, weights, *stacked])
    theirs = torch.autograd.grad(mixture(x, *stacked, ids, weights).square().sum(), [x, weights, *stacked])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert (ours[2][[1, 3, 4]] == 0).all()


@pytest.mark.gpu
def test_a_gpu_computes_the_same() -> None:
    """As near as products in TF32, of 10 bits, allow; a wrong sign or expert is off by the whole value, about 1."""
    module, x = layer(n_shared_experts=1), torch.randn(50, 16, requires_grad=True)
    output = module(x)
    expected_grads = gradients(module, x, output)
    y = x.detach().cuda().requires_grad_()
    on_gpu = module.cuda()(y)
    torch.testing.assert_close(on_gpu.cpu(), output, rtol=1e-3, atol=1e-3)
    for one, other in zip(gradients(module, y, on_gpu), expected_grads, strict=True):
        # Ten times the outputs' tolerance: a gradient goes through the rounded products twice, and sums 50 tokens.
        torch.testing.assert_close(one.cpu(), other, rtol=1e-2, atol=1e-2)


def test_experts_in_bfloat16_stay_near_float32() -> None:
    module = layer()
    x = torch.randn(40, 16)
    ids, weights = torch.randint(0, 6, (40, 2)), torch.rand(40, 2)
    exact = module.experts(x, ids, weights)
    rounded = module.bfloat16().experts(x.bfloat16(), ids, weights.bfloat16())
    assert (rounded - exact).abs().max() < 0.03 * exact.abs().max()


def test_shared_experts_are_added_for_every_token() -> None:
    module = layer(n_shared_experts=2)
    assert module.shared_experts is not None and module.shared_experts.up_proj.out_features == 16
    x = torch.randn(5, 16)
    torch.testing.assert_close(module(x), expected(module, x)[0] + module.shared_experts(x))


def test_bias_enters_the_choice_and_never_the_gate() -> None:
    module = layer(router_bias_update_rate=0.01, norm_topk_prob=False)
    bias = module.gate.e_score_correction_bias
    assert bias is not None
    x = torch.randn(9, 16)
    bias[3] = 100.0
    record = RoutingRecord()
    output = module(x, record)
    assert (record.chosen[0] == 3).any(dim=-1).all()
    reference, choices = expected(module, x)
    assert torch.equal(record.chosen[0], choices)
    torch.testing.assert_close(output, reference)


def test_replay_uses_the_given_choices_with_live_gates() -> None:
    module = layer()
    x = torch.randn(6, 16, requires_grad=True)
    replay = torch.tensor([[4, 1], [0, 5], [-1, -1], [2, 3], [-1, -1], [1, 0]], dtype=torch.int16)
    record = RoutingRecord(replay=replay[:, None])
    output, (reference, choices) = module(x, record), expected(module, x, replay)
    assert torch.equal(record.chosen[0], choices) and torch.equal(choices[0], torch.tensor([4, 1]))
    torch.testing.assert_close(output, reference)
    ours, theirs = gradients(module, x, output), gradients(module, x, reference)
    assert ours[1].abs().sum() > 0, "the router keeps its gradient"
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_replaying_own_choices_changes_nothing() -> None:
    policy, tokens = model(), torch.randint(0, 32, (1, 13))
    first = RoutingRecord()
    output = policy(tokens, routing=first).logits
    assert first.stacked_choices().shape == (13, 2, 2) and first.stacked_choices().dtype == torch.int16
    again = RoutingRecord(replay=first.stacked_choices())
    torch.testing.assert_close(policy(tokens, routing=again).logits, output)
    assert torch.equal(again.stacked_choices(), first.stacked_choices())
    assert first.disagreement() is None and again.disagreement().abs().max() == 0


def test_disagreement_is_the_fraction_of_layers_with_another_set_of_experts() -> None:
    policy, tokens = model(), torch.randint(0, 32, (1, 5))
    first = RoutingRecord()
    policy(tokens, routing=first)
    choices = first.stacked_choices()
    replay = choices.flip(-1).contiguous()  # another order is the same set
    replay[1, 1] = (choices[1, 1] + 1) % 6  # the second sparse layer of the second token
    replay[2] = -1
    record = RoutingRecord(replay=replay)
    policy(tokens, routing=record)
    told = record.disagreement()
    assert told is not None
    changed = set(replay[1, 1].tolist()) != set(choices[1, 1].tolist())
    assert told.tolist() == [0.0, 0.5 * changed, 0.0, 0.0, 0.0] and changed


def test_router_losses_are_per_token_and_weighted() -> None:
    policy = model(router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    policy.model.layers[0].mlp.gate.expert_load.copy_(torch.tensor([0.5, 0.1, 0.1, 0.1, 0.1, 0.1]))
    record, seen = RoutingRecord(), {}
    hooks = [
        policy.model.layers[index].mlp.gate.register_forward_hook(
            lambda module, inputs, output, index=index: seen.update({index: (module, output[0])})
        )
        for index in (0, 2)
    ]
    policy(torch.randint(0, 32, (1, 7)), routing=record)
    total = torch.zeros(7)
    for module, logits in seen.values():
        probs = logits.softmax(-1)
        total += 0.5 * 6 * (probs * module.expert_load).sum(-1) + 0.25 * logits.exp().sum(-1).log() ** 2
    loss = record.total_loss()
    assert loss is not None and loss.requires_grad
    torch.testing.assert_close(loss, total)
    for hook in hooks:
        hook.remove()


def test_no_router_loss_without_coefficients() -> None:
    record = RoutingRecord()
    model()(torch.randint(0, 32, (1, 4)), routing=record)
    assert record.total_loss() is None


def test_activation_checkpointing_repeats_choices_and_counts_once() -> None:
    tokens = torch.randint(0, 32, (1, 10))
    found = []
    for checkpointing in (False, True):
        policy = model(router_aux_loss_coef=0.1, router_bias_update_rate=0.5).train()
        if checkpointing:
            policy.gradient_checkpointing_enable()
        record = RoutingRecord()
        output = policy(tokens, routing=record)
        # If the recomputation chose experts again, this bias would change its choices.
        for index in (0, 2):
            policy.model.layers[index].mlp.gate.e_score_correction_bias.copy_(torch.arange(6.0) * 10)
        loss = record.total_loss()
        assert loss is not None
        (output.logits.square().mean() + loss.mean()).backward()
        found.append((record, expert_counts(policy), [p.grad for p in policy.parameters()]))
    (plain, counts, grads), (other, other_counts, other_grads) = found
    assert torch.equal(counts, other_counts) and counts.sum() == 10 * 2 * 2
    assert torch.equal(plain.stacked_choices(), other.stacked_choices())
    for ours, theirs in zip(other_grads, grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_only_training_passes_count_and_only_counted_tokens() -> None:
    policy, tokens = model(), torch.randint(0, 32, (1, 10))
    policy.eval()(tokens)
    with torch.no_grad():
        policy.train()(tokens)
    assert expert_counts(policy).sum() == 0
    policy(tokens, routing=RoutingRecord(counted=torch.arange(10) < 3))
    assert expert_counts(policy).sum(-1).tolist() == [6, 6]
    policy(tokens)
    assert expert_counts(policy).sum(-1).tolist() == [26, 26]


def test_finishing_a_step_sets_load_and_bias_and_clears_counts() -> None:
    policy = model(router_bias_update_rate=0.125, num_experts=4)
    policy.train()(torch.randint(0, 32, (1, 5)))
    counts = torch.tensor([[6, 2, 2, 2], [0, 0, 0, 0]])
    take_loads(policy, counts)
    assert all(b.abs().sum() == 0 for n, b in policy.named_buffers() if n.endswith("correction_bias"))
    move_biases(policy, counts)
    first, second = policy.model.layers[0].mlp.gate, policy.model.layers[2].mlp.gate
    torch.testing.assert_close(first.expert_load, torch.tensor([0.5, 1 / 6, 1 / 6, 1 / 6]))
    torch.testing.assert_close(first.e_score_correction_bias, torch.tensor([-0.125, 0.125, 0.125, 0.125]))
    torch.testing.assert_close(second.expert_load, torch.full((4,), 0.25))
    assert second.e_score_correction_bias.abs().sum() == 0
    assert expert_counts(policy).sum() == 0


def test_balance_gradient_does_not_depend_on_the_split() -> None:
    tokens, grads = torch.randint(0, 32, (6, 5)), []
    for pieces in ([6], [1, 3, 2]):
        policy = model(router_aux_loss_coef=0.3).train()
        take_loads(policy, torch.tensor([[5, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 5]]))
        for piece in tokens.split(pieces):
            record = RoutingRecord()
            policy(piece, routing=record)
            loss = record.total_loss()
            assert loss is not None
            loss.sum().div(30).backward()
        grads.append((policy.model.layers[0].mlp.gate.weight.grad, expert_counts(policy)))
    torch.testing.assert_close(grads[0][0], grads[1][0])
    assert grads[0][0].abs().max() > 1e-6 and torch.equal(grads[0][1], grads[1][1])


def test_loads_and_biases_stay_float32_in_any_dtype() -> None:
    policy = model(router_bias_update_rate=0.001)
    counts = torch.tensor([[3, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 3]])
    take_loads(policy, counts)
    move_biases(policy, counts)
    before = {name: buffer.clone() for name, buffer in policy.named_buffers() if ".gate." in name}
    assert len(before) == 4 and before["model.layers.0.mlp.gate.expert_load"][0] == 0.5
    after = dict(policy.bfloat16().float().named_buffers())
    assert all(after[name].dtype == torch.float32 and torch.equal(after[name], before[name]) for name in before)


def test_a_record_serves_one_pass() -> None:
    policy, record = model(), RoutingRecord()
    policy(torch.randint(0, 32, (1, 4)), routing=record)
    with pytest.raises(AssertionError, match="one forward pass"):
        policy(torch.randint(0, 32, (1, 4)), routing=record)


def test_dense_models_have_no_counts() -> None:
    dense = model(num_experts=0, moe_intermediate_size=None, mlp_layer_types=None)
    assert expert_counts(dense).shape == (0, 0)
    take_loads(dense, expert_counts(dense))


class EvenRouter(torch.nn.Module):
    """Gives the tokens to the experts in turn, with equal gates; it has no losses, load or bias."""

    def __init__(self, num_experts: int, num_choices: int) -> None:
        super().__init__()
        self.num_experts, self.num_choices = num_experts, num_choices
        self.total = torch.zeros(num_experts, dtype=torch.int64)

    def forward(self, hidden: Tensor, tokens: RoutedTokens) -> RouterScores:
        scores = hidden.new_zeros(len(hidden), self.num_experts)
        return RouterScores(scores, scores)

    def choose(self, scores: RouterScores, tokens: RoutedTokens) -> Tensor:
        first = torch.arange(len(scores.logits))[:, None]
        return (first + torch.arange(self.num_choices)) % self.num_experts

    def gates(self, scores: RouterScores, choices: Tensor) -> Tensor:
        return torch.full(choices.shape, 1 / self.num_choices)

    def losses(self, scores: RouterScores, tokens: RoutedTokens) -> None:
        return None

    def count(self, choices: Tensor, counted: Tensor | None = None) -> None:
        counted_choices = choices if counted is None else choices[counted]
        self.total += torch.bincount(counted_choices.flatten(), minlength=self.num_experts)

    def counts(self) -> Tensor:
        return self.total

    def forget_counts(self) -> None:
        self.total = torch.zeros_like(self.total)

    def take_load(self, counts: Tensor) -> None:
        pass

    def move_bias(self, counts: Tensor) -> None:
        pass


def test_another_router_is_recorded_replayed_and_counted() -> None:
    policy = model(router_aux_loss_coef=0.1).train()
    for index in (0, 2):
        policy.model.layers[index].mlp.gate = EvenRouter(6, 2)
    assert isinstance(policy.model.layers[0].mlp.gate, Router)
    tokens, record = torch.randint(0, 32, (1, 7)), RoutingRecord(counted=torch.arange(7) < 6)
    output = policy(tokens, routing=record)
    assert record.stacked_choices()[:, 0].tolist() == [[n % 6, (n + 1) % 6] for n in range(7)]
    assert record.total_loss() is None
    assert expert_counts(policy).tolist() == [[2] * 6] * 2
    replay = record.stacked_choices().flip(0).contiguous()
    again = RoutingRecord(replay=replay)
    assert not torch.equal(policy(tokens, routing=again).logits, output.logits)
    assert torch.equal(again.stacked_choices(), replay)
    counts = expert_counts(policy)
    move_biases(policy, counts)
    take_loads(policy, counts)
    assert expert_counts(policy).sum() == 0

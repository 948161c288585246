"""What every router has in common: records, replays, counts, checkpointing, dtypes, checkpoints, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.errors import ConfigError
from alignlab.loop.memory import kept_bytes
from alignlab.models.config import PolicyConfig
from alignlab.models.hub.checkpoints import load_model, save_model
from alignlab.models.moe import expert_counts, move_biases, routers, take_loads
from alignlab.models.routers.coded import coded, experts_of
from alignlab.models.routers.protocol import Router
from alignlab.models.routing import RoutingRecord, with_replay
from tests.models.routers_cases import CAUSAL, ROUTERS, SEGMENTS, SHAPE, model, states, weight_gradients
from tests.reference.moe import mixture


def tokens() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 32, (SEGMENTS.num_tokens,))


@pytest.mark.parametrize("name", ROUTERS)
def test_replayed_choices_give_the_recorded_pass_with_its_gradients(name: str) -> None:
    """The engine's choices, made in evaluation, are replayed in training, noise and balance or not."""
    lm, ids = model(**ROUTERS[name]), tokens()
    first = RoutingRecord()
    output = states(lm, ids, first)
    expected = weight_gradients(lm, output)
    replay = first.stacked_choices()
    assert replay.dtype == torch.int16 and (replay != -1).all()
    for router in routers(lm):  # what the router would choose by itself is something else now
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.copy_(torch.arange(6.0))
    again = RoutingRecord(replay=replay)
    replayed = states(lm.train(), ids, again)
    torch.testing.assert_close(replayed, output)
    assert torch.equal(again.stacked_choices(), replay)
    for key, gradient in weight_gradients(lm, replayed).items():
        torch.testing.assert_close(gradient, expected[key], msg=key)
    assert any(expected[key].abs().max() > 1e-4 for key in expected if key.endswith("gate.weight")) or name == "base"


@pytest.mark.parametrize("name", ROUTERS)
def test_experts_of_a_layer_are_the_recorded_ones_alone(name: str) -> None:
    """The layer's output equals a loop over the kept choices with the router's gates, drops and all."""
    lm, ids = model(**ROUTERS[name]).train(), tokens()
    block, seen = lm.model.layers[2].mlp, {}
    block.register_forward_hook(lambda _, inputs, output: seen.update(hidden=inputs[0], output=output))
    block.gate.register_forward_hook(lambda _, inputs, output: seen.update(scores=output))
    record = RoutingRecord()
    states(lm, ids, record)
    choices = record.chosen[1]
    gates = block.gate.gates(seen["scores"], choices)
    assert (gates[choices < 0] == 0).all() and (gates[choices >= 0] > 0).all()
    hidden = seen["hidden"].reshape(-1, 16)
    reference = mixture(hidden, block.experts.gate_up_proj, block.experts.down_proj, experts_of(choices), gates)
    torch.testing.assert_close(seen["output"].view_as(reference), reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ROUTERS)
def test_counts_are_of_counted_tokens_in_training(name: str) -> None:
    lm, ids = model(**ROUTERS[name]).train(), tokens()
    assert all(isinstance(router, Router) for router in routers(lm))
    counted = torch.arange(len(ids)) % 3 > 0
    record = RoutingRecord(counted=counted)
    states(lm, ids, record)
    for layer, counts in enumerate(expert_counts(lm)):
        chosen = record.chosen[layer][counted]
        asked = chosen[chosen >= 0] if name == "expert_choice" else experts_of(chosen)
        assert torch.equal(counts, asked.flatten().bincount(minlength=6))
    counts = expert_counts(lm)
    take_loads(lm, counts)
    move_biases(lm, counts)
    assert expert_counts(lm).sum() == 0
    torch.testing.assert_close(routers(lm)[0].expert_load, counts[0] / counts[0].sum())


@pytest.mark.parametrize("name", ROUTERS)
def test_activation_checkpointing_gives_the_same_gradients(name: str) -> None:
    found = []
    for checkpointing in (False, True):
        lm = model(**ROUTERS[name], router_z_loss_coef=0.1).train()
        if checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        record = RoutingRecord()
        output = states(lm, tokens(), record)
        loss = record.total_loss()
        assert loss is not None
        policy = record.policy()
        extra = loss if policy is None else loss + policy.logprobs.sum(1) + policy.baselines.sum(1)
        found.append((expert_counts(lm), weight_gradients(lm, torch.cat([output, extra[:, None]], dim=1))))
    assert torch.equal(found[0][0], found[1][0])
    for key, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], gradient, msg=key)


@pytest.mark.parametrize("name", ROUTERS)
def test_saved_and_loaded_it_routes_alike(name: str, tmp_path: Path) -> None:
    lm, ids = model(**ROUTERS[name]), tokens()
    save_model(lm, tmp_path)
    loaded: Any = load_model(str(tmp_path), dtype=torch.float32)
    first, again = RoutingRecord(), RoutingRecord()
    torch.testing.assert_close(states(loaded, ids, again), states(lm, ids, first))
    assert torch.equal(again.stacked_choices(), first.stacked_choices())
    assert loaded.config.router_type == lm.config.router_type


@pytest.mark.parametrize("name", ROUTERS)
def test_buffers_keep_their_dtypes_and_values_in_16_bits(name: str) -> None:
    lm = model(**ROUTERS[name])
    before = {key: buffer.clone() for key, buffer in lm.named_buffers() if ".gate." in key}
    after = dict(copy.deepcopy(lm).bfloat16().float().named_buffers())
    assert before and all(
        after[key].dtype == buffer.dtype and torch.equal(after[key], buffer) for key, buffer in before.items()
    )


@pytest.mark.parametrize("name", ROUTERS)
def test_the_memory_of_a_pass_is_predicted_without_values(name: str) -> None:
    lm = model(**ROUTERS[name]).bfloat16().to("meta")
    assert kept_bytes(lm, 36) > kept_bytes(lm, 18) > 0


@pytest.mark.parametrize("name", CAUSAL)
def test_tokens_one_by_one_over_a_cache_are_those_of_a_whole_pass(name: str) -> None:
    if "capacity_factor" in ROUTERS[name]:
        pytest.skip("a step of one token drops other choices than a pass of all")
    lm, ids = model(**ROUTERS[name]), tokens()[None]
    whole, cache, steps = lm(ids, use_cache=False).logits, None, []
    for position in range(ids.shape[1]):
        step = lm(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_dropped_choices_fit_in_a_record_and_unrecorded_tokens_choose_themselves() -> None:
    experts = torch.tensor([[0, 3], [5, 1], [2, 4]])
    choices = coded(experts, torch.tensor([[True, False], [False, False], [True, True]]))
    assert choices.tolist() == [[0, -5], [-7, -3], [2, 4]]
    assert torch.equal(experts_of(choices.to(torch.int16)).long(), experts)
    record = torch.tensor([[-2, 1], [-1, -1], [-6, -3]], dtype=torch.int16)
    assert with_replay(choices, record).tolist() == [[-2, 1], [-7, -3], [-6, -3]]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"router_type": "best"}, "router_type is 'best'"),
        ({"scoring_func": "tanh"}, "scoring_func is 'tanh'"),
        ({"topk_method": "noaux_tc"}, "needs n_group and topk_group"),
        ({"topk_method": "noaux_tc", "n_group": 4, "topk_group": 2}, "n_group is 4, and must divide num_experts"),
        ({"topk_method": "noaux_tc", "n_group": 6, "topk_group": 2}, "must have 2 experts or more"),
        ({"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 4}, "must be from 1 to n_group"),
        (
            {"topk_method": "group_limited_greedy", "n_group": 6, "topk_group": 1},
            "must hold num_experts_per_tok",
        ),
        ({"topk_method": "noaux_tc", "n_group": 3, "topk_group": 2, "router_type": "sinkhorn"}, "chooses in another"),
        ({"topk_group": 2}, "n_group is not given"),
        ({"capacity_factor": 0}, "capacity_factor is 0"),
        ({"capacity_factor": 1.0, "router_type": "expert_choice", "norm_topk_prob": False}, "gives every expert"),
        ({"capacity_priority": "age"}, "capacity_priority is 'age'"),
        ({"router_device_aux_loss_coef": 0.1}, "n_group must be given"),
        ({"router_comm_aux_loss_coef": 0.1, "n_group": 3}, "topk_group must be given"),
        ({"router_type": "hash", "router_aux_loss_coef": 0.1}, "whose load it cannot move"),
        ({"router_type": "sinkhorn", "router_bias_update_rate": 0.1}, "has no bias"),
        ({"router_load_loss_coef": 0.1}, "is a loss of router_type noisy_topk"),
        ({"router_type": "reinforce"}, "router_reinforce_coef is 0.0, and must be above 0 exactly"),
        ({"router_reinforce_coef": 0.1}, "must be above 0 exactly"),
        ({"router_type": "noisy_topk", "scoring_func": "sigmoid"}, "is defined with softmax"),
        ({"router_type": "expert_choice"}, "norm_topk_prob is true"),
        (
            {"router_type": "base", "scoring_func": "sigmoid", "norm_topk_prob": False},
            "num_experts_per_tok is 2, and router_type base",
        ),
        ({"router_sinkhorn_rounds": 0}, "router_sinkhorn_rounds is 0"),
        ({"router_seq_aux_loss_coef": -0.1}, "must not be negative"),
    ],
)
def test_fields_that_do_not_go_together_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        PolicyConfig(**{**SHAPE, **changes})

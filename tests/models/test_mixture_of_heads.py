"""A mixture of attention heads: against one token and head at a time, its record of choices, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignlab.errors import ConfigError
from alignlab.models.attention_kinds import make_attention
from alignlab.models.config import PolicyConfig
from alignlab.models.decoder import hidden_states
from alignlab.models.moe import expert_counts, of_experts, routers, take_loads
from alignlab.models.routing import NONE, RoutingRecord
from alignlab.types import Segments
from tests.models.attention_kinds import KINDS, SHAPE, make_model

HEADS: dict[str, Any] = {**SHAPE, **KINDS["mixture-of-heads"], "num_hidden_layers": 1}


def test_a_layer_equals_one_token_and_head_at_a_time() -> None:
    torch.manual_seed(0)
    changes = {"layer_types": ["mixture_of_heads"], "use_qk_norm": False, "no_rope_layers": [0]}
    layer: Any = make_attention(PolicyConfig(**{**HEADS, **changes}), 0)
    x = torch.randn(7, 32)
    logits = x @ layer.gate.weight.T
    expected = torch.zeros(7, 32)
    for token in range(7):
        experts = logits[token].topk(2).indices
        weights = logits[token][experts].softmax(-1)  # over the chosen ones
        for expert, weight in zip(experts, weights, strict=True):
            query = layer.q_proj.weight[expert] @ x[token]
            keys, values = layer.k_proj(x[: token + 1]), layer.v_proj(x[: token + 1])
            attended = (keys @ query / 8**0.5).softmax(-1) @ values
            expected[token] += weight * (layer.o_proj.weight[expert] @ attended)
    output, _ = layer(x[None], None, layout=Segments.single(7))
    torch.testing.assert_close(output[0], expected, rtol=1e-4, atol=1e-5)


def test_choices_of_heads_stand_behind_those_of_experts_in_a_record() -> None:
    model = make_model("mixture-of-heads-and-experts").train()
    tokens, segments = torch.randint(0, 50, (9,)), Segments.single(9)
    record = RoutingRecord()
    states = hidden_states(model, tokens, segments.position_ids, segments, routing=record)
    choices = record.stacked_choices()
    assert choices.shape == (9, 3, 3) and (choices[:, :2, 2] == NONE).all()
    assert (choices[:, :2, :2] < 5).all() and (choices[:, 2] < 4).all() and (choices[:, 2] >= 0).all()
    replayed = RoutingRecord(replay=choices)
    again = hidden_states(model, tokens, segments.position_ids, segments, routing=replayed)
    torch.testing.assert_close(again, states)
    disagreement = replayed.disagreement()
    assert disagreement is not None and disagreement.eq(0).all()
    other = choices.clone()
    other[:, 2] = torch.tensor([3, 2, 1])
    forced = RoutingRecord(replay=other)
    assert (hidden_states(model, tokens, segments.position_ids, segments, routing=forced) - states).abs().max() > 1e-3
    assert forced.chosen[2].eq(torch.tensor([3, 2, 1])).all()


def test_heads_are_counted_apart_from_experts() -> None:
    model = make_model("mixture-of-heads-and-experts").train()
    tokens, segments = torch.randint(0, 50, (9,)), Segments.single(9)
    hidden_states(model, tokens, segments.position_ids, segments, routing=RoutingRecord())
    counts = expert_counts(model)
    assert counts.shape == (3, 5) and counts.sum(1).tolist() == [18, 18, 27] and counts[2, 4] == 0
    assert of_experts(model, counts).shape == (2, 5)
    take_loads(model, counts)
    loads = [router.expert_load for router in routers(model)]  # type: ignore[attr-defined]
    assert [len(load) for load in loads] == [5, 5, 4]
    torch.testing.assert_close(loads[2], counts[2, :4] / 27)


def test_a_balance_loss_of_heads_has_its_weight() -> None:
    tokens, segments = torch.randint(0, 50, (9,)), Segments.single(9)
    totals = []
    for coef in (0.01, 0.03):
        record = RoutingRecord()
        model = make_model("mixture-of-heads", attention_router_aux_loss_coef=coef).train()
        hidden_states(model, tokens, segments.position_ids, segments, routing=record)
        total = record.total_loss()
        assert total is not None
        totals.append(total)
    torch.testing.assert_close(totals[1], 3 * totals[0])
    assert totals[0].mean().item() == pytest.approx(0.02, rel=0.3)  # of two layers, each about 1 where loads are even


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_experts": None}, "num_attention_experts is None, and must be at least num_attention_heads"),
        ({"num_attention_experts": 1}, r"num_attention_experts is 1, .*heads \(2\) .* use 4"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2, and must be 1 where a layer is mixture_of_heads"),
        ({"head_dim": 12}, "head_dim is 12, and must be a multiple of 8 .* use 16"),
        ({"attention_router_aux_loss_coef": -1}, "attention_router_aux_loss_coef is -1, and must not be negative"),
        ({"layer_types": ["full_attention"]}, "num_attention_experts is 6, but no layer is mixture_of_heads"),
    ],
    ids=str,
)  # fmt: skip
def test_impossible_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyConfig(**{**HEADS, "layer_types": ["mixture_of_heads"], **changes})

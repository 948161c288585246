"""A mixture made of a dense model computes at first what the dense model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralForCausalLM, Qwen3MoeForCausalLM

from alignlab.errors import ConfigError
from alignlab.models.config import PolicyConfig
from alignlab.models.hub.checkpoints import load_model, save_model
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.models.upcycling import upcycled

SHAPE: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "initializer_range": 0.3, "use_qk_norm": True,
}


def dense(**changes: Any) -> PolicyForCausalLM:
    torch.manual_seed(0)
    return PolicyForCausalLM(PolicyConfig(**{**SHAPE, **changes})).eval()


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return model(input_ids=torch.randint(0, 40, (2, 30))).logits


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts": 4, "num_experts_per_tok": 1},
        {"num_experts": 8, "num_experts_per_tok": 3},
        {"num_experts": 4, "num_experts_per_tok": 4, "norm_topk_prob": False},
        {"num_experts": 4, "num_experts_per_tok": 2, "layers": (1,)},
        {"num_experts": 4, "num_experts_per_tok": 2, "method": "drop", "drop_frac": 0.0},
        {"num_experts": 8, "num_experts_per_tok": 4, "method": "virtual_groups", "slices": 4},
        {"num_experts": 16, "num_experts_per_tok": 8, "method": "virtual_groups", "slices": 4},
        {"num_experts": 4, "num_experts_per_tok": 2, "router": {"router_type": "hash"}},
        {"num_experts": 4, "num_experts_per_tok": 2, "router": {"scoring_func": "sigmoid"}},
    ],
    ids=str,
)
def test_output_is_the_dense_models(options: dict[str, Any]) -> None:
    model = dense()
    mixture = upcycled(model, **options)
    assert mixture.config.sparse_layers == list(options.get("layers", range(3)))
    assert mixture.config.moe_intermediate_size == 64 // options.get("slices", 1)
    expected = logits(model)
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits(mixture), expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_stays_near_the_dense_model() -> None:
    model = dense().bfloat16()
    gap = (logits(upcycled(model, num_experts=4, num_experts_per_tok=2)) - logits(model)).abs().max()
    assert gap < 0.1 * logits(model).abs().max()


def test_routers_are_new_and_equal_within_a_replica() -> None:
    mixture = upcycled(dense(), num_experts=8, num_experts_per_tok=4, method="virtual_groups", slices=4)
    for layer in mixture.model.layers:
        rows = layer.mlp.gate.weight
        assert torch.equal(rows[0], rows[3]) and torch.equal(rows[4], rows[7]) and not torch.equal(rows[0], rows[4])
    copies = upcycled(dense(), num_experts=4, num_experts_per_tok=2).model.layers[0].mlp.gate.weight
    assert len({tuple(row) for row in copies.tolist()}) == 4


def test_dropped_units_are_drawn_anew_with_their_statistics_in_all_three_weights() -> None:
    model = dense(intermediate_size=512, hidden_size=32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1.0)
    mixture = upcycled(model, num_experts=3, num_experts_per_tok=1, method="drop", drop_frac=0.25)
    old, experts = model.model.layers[0].mlp, mixture.model.layers[0].mlp.experts
    gates, ups = experts.gate_up_proj.chunk(2, dim=1)
    replaced = (ups != old.up_proj.weight).any(-1)
    assert replaced.sum(-1).tolist() == [128] * 3 and not torch.equal(replaced[0], replaced[1])
    assert torch.equal((gates != old.gate_proj.weight).any(-1), replaced)
    assert torch.equal((experts.down_proj != old.down_proj.weight).any(1), replaced)
    drawn, old_up = ups[0][replaced[0]].detach(), old.up_proj.weight.detach()
    assert float(drawn.mean()) == pytest.approx(1.0, abs=0.03)
    assert float(drawn.std()) == pytest.approx(float(old_up.std()), rel=0.05)


@pytest.mark.parametrize(("use_qk_norm", "family"), [(True, Qwen3MoeForCausalLM), (False, MixtralForCausalLM)])
def test_it_is_saved_as_a_hub_family(use_qk_norm: bool, family: Any, tmp_path: Path) -> None:
    model = dense(use_qk_norm=use_qk_norm)
    save_model(upcycled(model, num_experts=4, num_experts_per_tok=2), tmp_path)
    torch.testing.assert_close(logits(family.from_pretrained(tmp_path).eval()), logits(model), rtol=1e-3, atol=1e-3)
    loaded = load_model(str(tmp_path), dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob is false with 2 of 4 experts"),
        (
            {"router": {"router_type": "expert_choice"}, "norm_topk_prob": False},
            "router_type is expert_choice, and gates",
        ),
        ({"router": {"routed_scaling_factor": 2.5}}, "routed_scaling_factor is 2.5"),
        ({"router": {"capacity_factor": 1.0}}, "capacity_factor 1.0"),
        ({"method": "virtual_groups", "slices": 3}, r"slices is 3, .* divide intermediate_size \(64\)"),
        ({"method": "virtual_groups", "slices": 4}, r"divide num_experts_per_tok \(2\)"),
        ({"method": "virtual_groups"}, "slices is 1, and must be 2 or more"),
        ({"slices": 2}, "is of method virtual_groups"),
        ({"drop_frac": 1.5}, "drop_frac is 1.5"),
        ({"layers": [3]}, "numbers from 0 to 2"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5"),
    ],
)
def test_what_would_not_begin_where_the_dense_model_ends_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        upcycled(dense(), **{"num_experts": 4, "num_experts_per_tok": 2, **options})


def test_virtual_groups_in_16_bits_mixtures_and_biases_are_refused() -> None:
    groups: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "method": "virtual_groups", "slices": 2}
    with pytest.raises(ConfigError, match="the model is in bfloat16"):
        upcycled(dense().bfloat16(), **groups)
    with pytest.raises(ConfigError, match="with experts"):
        upcycled(upcycled(dense(), **groups), **groups)
    with pytest.raises(ConfigError, match="mlp_bias is true"):
        upcycled(dense(mlp_bias=True), **groups)

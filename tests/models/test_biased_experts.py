"""Experts and routers with biases, and the clamped SwiGLU of gpt-oss, against a plain loop; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.config.model import LoraSettings
from alignlab.errors import CheckpointError, ConfigError
from alignlab.models.adapters import add_lora
from alignlab.models.config import PolicyConfig
from alignlab.models.hub.checkpoints import load_model, new_model
from alignlab.models.layers import clamped_swiglu
from alignlab.models.merging import merged_state
from alignlab.models.moe import BiasedExperts
from alignlab.models.served_attention import check_served
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.models.upcycling import upcycled
from tests.models.attention_kinds import SHAPE, make_model

EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "expert_bias": True,
    "router_linear_bias": True, "swiglu_limit": 1.5, "swiglu_alpha": 1.3,
}  # fmt: skip
TOKENS = torch.arange(3, 21).view(2, 9)


def test_clamped_swiglu_by_hand() -> None:
    gate = torch.tensor([9.0, 1.0, -9.0, 0.5])
    up = torch.tensor([1.0, 8.0, -8.0, -0.25])
    cut = torch.tensor([2.0, 1.0, -9.0, 0.5])  # gates are cut off above alone
    factors = torch.tensor([2.0, 3.0, -1.0, 0.75])  # 1 + up, which is cut to [-2, 2]
    expected = cut / (1 + torch.exp(-1.5 * cut)) * factors
    torch.testing.assert_close(clamped_swiglu(gate, up, limit=2.0, alpha=1.5), expected)


def by_token(experts: BiasedExperts, hidden: Tensor, choices: Tensor, gates: Tensor) -> Tensor:
    """A slow twin: one token and one of its experts after another."""
    rows = []
    for row, ids, weights in zip(hidden, choices.tolist(), gates, strict=True):
        total = torch.zeros_like(row)
        for expert, weight in zip(ids, weights, strict=True):
            if expert >= 0:
                both = row @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
                inner = clamped_swiglu(both[0::2], both[1::2], limit=1.5, alpha=1.3)
                total = total + weight * (inner @ experts.down_proj[expert] + experts.down_proj_bias[expert])
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("drops", [False, True])
def test_experts_are_those_of_the_loop_in_values_and_gradients(drops: bool) -> None:
    torch.manual_seed(0)
    config = PolicyConfig(**SHAPE, **EXPERTS, capacity_factor=1.0 if drops else None)
    experts = BiasedExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    hidden, gates = torch.randn(7, 32, requires_grad=True), torch.rand(7, 2)
    choices = torch.randint(0, 3, (7, 2))  # the last expert has no token
    if drops:
        choices[1, 0], choices[5] = -2, torch.tensor([-3, -2])
        gates = gates.masked_fill(choices < 0, 0.0)
    outputs = [experts(hidden, choices, gates), by_token(experts, hidden, choices, gates)]
    torch.testing.assert_close(*outputs)
    inputs = [hidden, *experts.parameters()]
    ours, expected = (torch.autograd.grad(output.sin().sum(), inputs) for output in outputs)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_the_router_s_bias_is_in_choices_and_gates_and_is_trained() -> None:
    model: Any = make_model("biased-experts")
    router = model.model.layers[0].mlp.router
    torch.nn.init.zeros_(router.weight)
    router.bias.data = torch.tensor([0.5, 3.0, -1.0, 2.0])
    hidden = torch.randn(5, 32)
    scores = router(hidden, None)
    choices = router.choose(scores, None)
    assert choices.tolist() == [[1, 3]] * 5
    torch.testing.assert_close(router.gates(scores, choices), torch.tensor([[3.0, 2.0]] * 5).softmax(-1))
    model(TOKENS).logits.sum().backward()
    assert router.bias.grad.abs().max() > 0


def test_adapters_on_experts_are_merged_into_what_they_compute() -> None:
    adapted = add_lora(make_model("biased-experts"), LoraSettings(rank=2, experts=True))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    plain = make_model("biased-experts")
    with torch.no_grad():
        before = plain(TOKENS).logits
        plain.load_state_dict(merged_state(adapted))
        logits = adapted(TOKENS).logits
        torch.testing.assert_close(logits, plain(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert (logits - before).abs().max() > 0.1


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({**EXPERTS, "swiglu_limit": 0}, "swiglu_limit is 0, and must be above 0"),
    ({**EXPERTS, "swiglu_limit": None}, "swiglu_alpha is 1.3, and swiglu_limit is not given"),
    ({**EXPERTS, "hidden_act": "gelu"}, "swiglu_limit is 1.5, which is of SwiGLU, and hidden_act is gelu"),
    ({**EXPERTS, "router_type": "noisy_topk"}, "router_linear_bias is true, and router_type noisy_topk is defined"),
    *[
        ({name: value}, f"{name} is {value!r}, but no layer is sparse; make one sparse or leave it out")
        for name, value in {
            "router_bias": True, "scoring_func": "sigmoid", "router_in_fp32": True, "norm_topk_prob": False,
            "moe_intermediate_size": 8, "num_experts_per_tok": 3, "routed_scaling_factor": 2.0, "expert_bias": True,
            "router_linear_bias": True, "swiglu_limit": 7.0, "capacity_priority": "score", "router_sinkhorn_rounds": 3,
        }.items()
    ],
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_fields_that_nothing_reads_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyConfig(**{**SHAPE, **changes})


def test_a_dense_model_does_not_become_a_mixture_with_biases() -> None:
    with pytest.raises(ConfigError, match="expert_bias is true, and experts begin as copies of a feed-f"):
        upcycled(new_model(SHAPE, vocab_size=50), num_experts=4, num_experts_per_tok=2, router={"expert_bias": True})


def test_rollouts_by_vllm_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"expert_bias is true, and vLLM .* fails at an update of such experts"):
        check_served(make_model("biased-experts").config)
    unclamped = {"swiglu_limit": None, "swiglu_alpha": 1.702, "expert_bias": False}
    with pytest.raises(ConfigError, match="router_linear_bias is True, which vLLM serves of models of a Hub family"):
        check_served(make_model("biased-experts", **unclamped).config)


@pytest.mark.parametrize("method", ["mxfp4", "fp8"])
def test_quantised_weights_are_refused_with_the_way_out(method: str, tmp_path: Path) -> None:
    model = make_model("biased-experts")
    model.save_pretrained(tmp_path)
    config: dict[str, Any] = {"model_type": "gpt_oss", "quantization_config": {"quant_method": method}, **SHAPE}
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 50, "num_local_experts": 4}))
    config_class = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}[method]
    with pytest.raises(CheckpointError, match=rf"quantised \({method}\).*dequantise it first.*{config_class}\(deq"):
        load_model(str(tmp_path), dtype=torch.float32)


def test_a_model_of_such_experts_starts_without_biases() -> None:
    model: Any = PolicyForCausalLM(PolicyConfig(**SHAPE, **EXPERTS, vocab_size=50))
    mlp = model.model.layers[0].mlp
    biases = (mlp.router.bias, mlp.experts.gate_up_proj_bias, mlp.experts.down_proj_bias)
    assert all((bias == 0).all() for bias in biases)
    assert mlp.experts.gate_up_proj.shape == (4, 32, 32) and mlp.experts.down_proj.shape == (4, 16, 32)

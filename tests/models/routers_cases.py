"""Tiny mixtures, one for each router, and passes over packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignlab.models.config import PolicyConfig
from alignlab.models.moe import SparseFeedForward
from alignlab.models.routers.protocol import NOTHING_KNOWN, RoutedTokens, RouterScores
from alignlab.models.routing import RoutingRecord
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.types import Segments

SHAPE: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "initializer_range": 0.5,
    "mlp_layer_types": ["sparse", "dense", "sparse"],
}
GROUPS: dict[str, Any] = {"n_group": 3, "topk_group": 2}
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {"scoring_func": "sigmoid", "router_bias_update_rate": 0.1},
    "groups_v2": {"topk_method": "group_limited_greedy", "norm_topk_prob": False, **GROUPS},
    "groups_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "router_bias_update_rate": 0.1, **GROUPS},
    "by_order": {"capacity_factor": 0.75},
    "by_score": {"capacity_factor": 0.75, "capacity_priority": "score", "norm_topk_prob": False},
    "noisy": {"router_type": "noisy_topk"},
    "hash": {"router_type": "hash", "scoring_func": "sqrtsoftplus"},
    "base": {"router_type": "base", "scoring_func": "sigmoid", "norm_topk_prob": False, "num_experts_per_tok": 1},
    "sinkhorn": {"router_type": "sinkhorn"},
    "expert_choice": {"router_type": "expert_choice", "norm_topk_prob": False},
    "reinforce": {"router_type": "reinforce", "router_reinforce_coef": 0.5},
}
CAUSAL = sorted(set(ROUTERS) - {"expert_choice"})

SEGMENTS = Segments((4, 3, 5, 6), (-1, 0, 0, -1), (-1, 0, 1, 2), (0, 0, 0, 1))
"""A prompt with two completions, and a sequence of its own."""


def layer(**changes: Any) -> SparseFeedForward:
    """One sparse feed-forward with random weights."""
    torch.manual_seed(0)
    module = SparseFeedForward(PolicyConfig(**{**SHAPE, **changes}), 0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def model(**changes: Any) -> PolicyForCausalLM:
    """A model of two sparse layers; a noisy router's noise and a policy's baseline depend on the token."""
    torch.manual_seed(0)
    lm = PolicyForCausalLM(PolicyConfig(**{**SHAPE, **changes})).eval()
    for name, parameter in lm.named_parameters():
        if "noise" in name or "baseline" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return lm


def states(lm: PolicyForCausalLM, tokens: Tensor, record: RoutingRecord, segments: Segments = SEGMENTS) -> Tensor:
    """The hidden states [N, H] of packed tokens."""
    from alignlab.models.decoder import hidden_states

    return hidden_states(lm, tokens, segments.position_ids, segments, routing=record)


def weight_gradients(lm: torch.nn.Module, output: Tensor) -> dict[str, Tensor]:
    """Gradients by name of a fixed combination of outputs; 0 for a weight without one."""
    lm.zero_grad()
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in lm.named_parameters()}


TRAINS = RoutedTokens(trains=True)


def scores_of(module: Any, tokens: int = 40, routed: RoutedTokens = NOTHING_KNOWN) -> RouterScores:
    """Scores of random hidden states."""
    torch.manual_seed(2)
    return module.gate(torch.randn(tokens, 16), routed)

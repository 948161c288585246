"""Mixture of attention heads: a router gives each token some of many query heads; keys and values are shared by all.

Shapes: B batch (1 where there is a layout), N tokens, M = B * N, E experts, H heads of a token, D head size.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache
from transformers import initialization as init

from alignlab.models.attention import rotary_size
from alignlab.models.attention_layer import AttentionLayer
from alignlab.models.cache_spec import LayerCacheSpec
from alignlab.models.config import PolicyConfig
from alignlab.models.config_rules import require
from alignlab.models.layers import make_norm
from alignlab.models.moe import ExpertOrder, expert_order, regroup
from alignlab.models.rope import Rotation, rotate
from alignlab.models.routers.protocol import NOTHING_KNOWN
from alignlab.models.routers.topk import TopKRouter
from alignlab.models.routing import RoutingRecord

FIELDS = ("num_attention_experts", "attention_router_aux_loss_coef")
"""Fields of a config that mean something for a mixture of heads alone."""


class ExpertProjection(nn.Module):
    """A linear layer for each expert, [E, out, in], computed as one grouped product."""

    def __init__(self, num_experts: int, size_in: int, size_out: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(num_experts, size_out, size_in))
        self.initialize()

    def initialize(self) -> None:
        """Draw the weights."""
        init.normal_(self.weight, std=self.std)

    def forward(self, rows: Tensor, order: ExpertOrder, copies: int) -> Tensor:
        """Return the products of rows [M, in] (or [M*H, in], where `copies` is 1) with their experts, [M*H, out].

        Args:
            copies: H where each row goes to H experts, 1 where each row has one of its own.
        """
        grouped = F.grouped_mm(regroup(rows, order, copies), self.weight.transpose(1, 2), offs=order.ends)
        return regroup(grouped, order.back, 1)


class MixtureOfHeads(AttentionLayer):
    """Each token attends with `num_attention_heads` heads of `num_attention_experts`, weighted by its router.

    A head's expert has a query and an output projection; one key and one value head serve all. The output is the sum
    of the heads' outputs, with weights that sum to 1.

    Reference: Zhang et al. (2022), arXiv:2210.05144, Eq. 5-8.
    """

    routes: ClassVar[bool] = True

    def __init__(self, config: PolicyConfig, layer_idx: int) -> None:
        assert config.head_dim and config.num_attention_experts
        size = config.head_dim
        super().__init__(config, layer_idx, query_size=size, rotary_size=rotary_size(config))
        self.head_dim, self.num_heads = size, config.num_attention_heads
        self.num_key_value_groups = self.num_heads
        self.unrotated_size = size - rotary_size(config)
        self.routing_index = config.router_index(layer_idx)
        self.gate = TopKRouter(_config_of_router(config))
        experts, hidden, std = config.num_attention_experts, config.hidden_size, config.initializer_range
        self.num_experts = experts
        self.q_proj = ExpertProjection(experts, hidden, size, std)
        self.k_proj = nn.Linear(hidden, size, bias=config.attention_bias)
        self.v_proj = nn.Linear(hidden, size, bias=config.attention_bias)
        self.o_proj = ExpertProjection(experts, size, hidden, std)
        self.use_qk_norm = config.use_qk_norm
        if config.use_qk_norm:
            self.q_norm, self.k_norm = make_norm(config, size), make_norm(config, size)

    @classmethod
    def check_config(cls, config: PolicyConfig) -> None:
        """Raise a ConfigError if there are fewer experts than heads, or sizes that a grouped product cannot take."""
        experts, heads, size = config.num_attention_experts, config.num_attention_heads, config.head_dim
        require(
            experts is not None and experts >= heads,
            f"num_attention_experts is {experts}, and must be at least num_attention_heads ({heads}) where a layer is "
            f"mixture_of_heads; use {2 * heads}",
        )
        require(
            config.num_key_value_heads == 1,
            f"num_key_value_heads is {config.num_key_value_heads}, and must be 1 where a layer is mixture_of_heads, "
            "whose heads share one key and one value",
        )
        for name, width in (("head_dim", size), ("hidden_size", config.hidden_size)):
            require(
                width is not None and width % 8 == 0,
                f"{name} is {width}, and must be a multiple of 8 where a layer is mixture_of_heads, for its grouped "
                f"products; use {-(-(width or 8) // 8) * 8}",
            )
        require(
            config.qk_norm_scope == "head" and not config.fused_projections,
            "qk_norm_scope is all_heads or fused_projections is true, and a layer that is mixture_of_heads has "
            "neither; leave them out",
        )
        coef = config.attention_router_aux_loss_coef or 0.0
        require(coef >= 0, f"attention_router_aux_loss_coef is {coef}, and must not be negative; use 0 to turn it off")

    def cache_spec(self) -> LayerCacheSpec:
        """Return what the layer keeps of a token: its rotated key and its value."""
        return LayerCacheSpec.of_heads(
            1, self.head_dim, self.head_dim, window=self.sliding_window, query_heads=self.config.num_attention_heads
        )

    def forward(
        self, hidden_states: Tensor, position_embeddings: Rotation | None, attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None, *, routing: RoutingRecord | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return attention of hidden states [B,N,hidden size], and the weights, if the attention function gives any.

        Args:
            position_embeddings: of `rotary_size`; None in a layer without positions.
            routing: choices to replay, and where those made are noted.
        """
        shape, flat = hidden_states.shape[:2], hidden_states.flatten(0, 1)
        scores = self.gate(flat, NOTHING_KNOWN if routing is None else routing.tokens)
        if routing is None:
            choices = self.gate.choose(scores, NOTHING_KNOWN)
        else:
            choices = routing.choose(self.routing_index, self.gate, scores)
        order = expert_order(choices, self.num_experts)
        query = self.q_proj(flat, order, self.num_heads).view(*shape, self.num_heads, self.head_dim)
        key, value = (proj(hidden_states).unsqueeze(2) for proj in (self.k_proj, self.v_proj))
        if self.use_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        if position_embeddings is not None:
            query = rotate(query, position_embeddings, self.unrotated_size)
            key = rotate(key, position_embeddings, self.unrotated_size)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = self.attend(query, key, value, attention_mask, **kwargs)
        heads = self.o_proj(output.reshape(-1, self.head_dim), order, 1).view(*shape, self.num_heads, -1)
        gates = self.gate.gates(scores, choices).to(heads.dtype).view(*shape, self.num_heads, 1)
        return (heads * gates).sum(2), weights


def _config_of_router(config: PolicyConfig) -> PolicyConfig:
    """Return the config as a router of heads reads it: plain top-k by softmax, whatever the experts' routers are."""
    view = copy.copy(config)
    view.num_experts, view.num_experts_per_tok = config.num_attention_experts or 0, config.num_attention_heads
    view.router_type, view.scoring_func, view.topk_method = "topk", "softmax", "greedy"
    view.norm_topk_prob, view.routed_scaling_factor, view.capacity_factor = True, 1.0, None
    view.n_group = view.topk_group = None
    for name in (
        "router_z_loss_coef", "router_bias_update_rate", "router_seq_aux_loss_coef", "router_device_aux_loss_coef",
        "router_comm_aux_loss_coef", "router_importance_loss_coef", "router_load_loss_coef", "router_reinforce_coef",
    ):
        setattr(view, name, 0.0)
    view.router_bias = view.router_linear_bias = False
    view.router_aux_loss_coef = config.attention_router_aux_loss_coef or 0.0
    return view

"""Multi-head, grouped-query and multi-query attention, over all tokens or over a window.

Shapes: B batch (1 where there is a layout), N tokens, H heads, K kv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import Cache
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from alignlab.models.attention_layer import AttentionLayer, eager_attention
from alignlab.models.cache_spec import LayerCacheSpec
from alignlab.models.config import PolicyConfig
from alignlab.models.config_rules import require
from alignlab.models.layers import make_norm
from alignlab.models.rope import Rotation, rotate


class Attention(AttentionLayer):
    """Attention of H query heads to K key and value heads, each of which serves H / K of them.

    Reference: Ainslie et al. (2023), arXiv:2305.13245.
    """

    def __init__(self, config: PolicyConfig, layer_idx: int) -> None:
        assert config.num_key_value_heads and config.head_dim
        super().__init__(config, layer_idx, query_size=config.head_dim, rotary_size=rotary_size(config))
        self.head_dim = config.head_dim
        self.unrotated_size = config.head_dim - rotary_size(config)
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        output_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.fused = config.fused_projections
        self.sizes = [self.query_rows(config), key_size, key_size]
        if self.fused:
            self.qkv_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=config.attention_bias)
        else:
            self.q_proj = nn.Linear(config.hidden_size, self.sizes[0], bias=config.attention_bias)
            self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
            self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(output_size, config.hidden_size, bias=bool(config.attention_out_bias))
        self.use_qk_norm = config.use_qk_norm
        self.norms_all_heads = config.use_qk_norm and config.qk_norm_scope == "all_heads"
        self.norms_each_head = config.use_qk_norm and not self.norms_all_heads
        if config.use_qk_norm:
            self.q_norm = make_norm(config, output_size if self.norms_all_heads else config.head_dim)
            self.k_norm = make_norm(config, key_size if self.norms_all_heads else config.head_dim)

    @classmethod
    def check_config(cls, config: PolicyConfig) -> None:
        """Raise a ConfigError if heads do not divide, or a part of a head cannot be rotated."""
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        assert kv_heads is not None and config.head_dim is not None
        require(
            kv_heads >= 1 and heads % kv_heads == 0,
            f"num_attention_heads is {heads}, and must be a multiple of num_key_value_heads ({kv_heads}); "
            f"use 1 or {heads}, or a divisor between",
        )
        factor = config.rotary_factor
        require(0 < factor <= 1, f"partial_rotary_factor is {factor}, and must be in (0, 1]; leave it out for all")
        size = config.head_dim * factor
        require(
            size % 2 == 0 and size > 0,
            f"head_dim is {config.head_dim} and partial_rotary_factor {factor:g}, and their product, {size:g}, must be "
            f"even for the rotation; use head_dim {config.head_dim + 1}, or another factor",
        )

    @classmethod
    def query_rows(cls, config: PolicyConfig) -> int:
        """Return the numbers that `q_proj` computes of a token."""
        assert config.head_dim is not None
        return config.num_attention_heads * config.head_dim

    def cache_spec(self) -> LayerCacheSpec:
        """Return what the layer keeps of a token: its rotated key and its value."""
        heads = self.config.num_key_value_heads
        assert heads is not None
        return LayerCacheSpec.of_heads(
            heads, self.head_dim, self.head_dim, window=self.sliding_window,
            query_heads=self.config.num_attention_heads,
        )

    def forward(
        self, hidden_states: Tensor, position_embeddings: Rotation | None, attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return attention of hidden states [B,N,hidden size], and the weights, if the attention function gives any.

        Args:
            position_embeddings: of `rotary_size`; None in a layer without positions.
        """
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        if self.fused:
            query, key, value = self.qkv_proj(hidden_states).split(self.sizes, dim=-1)
        else:
            query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.norms_all_heads:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.view(heads), key.view(heads)
        if self.norms_each_head:
            query, key = self.q_norm(query), self.k_norm(key)
        if position_embeddings is not None:
            query = rotate(query, position_embeddings, self.unrotated_size)
            key = rotate(key, position_embeddings, self.unrotated_size)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        value = value.view(heads).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            softcap=self.softcap,
            s_aux=self.sinks,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class SlidingAttention(Attention):
    """Attention to the last `config.sliding_window` tokens, the token itself included."""

    has_window: ClassVar[bool] = True

    @classmethod
    def make_mask(cls, config: PolicyConfig, **arguments: Any) -> Any:
        """Return the mask of an ordinary padded batch, whose cache holds the window alone."""
        return create_sliding_window_causal_mask(config=config, **arguments)


def rotary_size(config: PolicyConfig) -> int:
    """Return how many leading numbers of a head are rotated: `partial_rotary_factor` of it."""
    assert config.head_dim is not None
    return int(config.head_dim * config.rotary_factor)

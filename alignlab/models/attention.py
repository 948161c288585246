"""Multi-head, grouped-query and multi-query attention.

Shapes: B batch (1 where there is a layout), N tokens, H heads, K kv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import alignlab.models.layout  # noqa: F401  registers the attention function
from alignlab.models.cache_spec import LayerCacheSpec
from alignlab.models.config import PolicyConfig
from alignlab.models.layers import RMSNorm
from alignlab.models.rope import Rotation, rotate


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    *, scaling: float, dropout: float = 0.0, softcap: float | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Compute attention step by step, as `attn_implementation="eager"` asks: ([B,N,H,D], weights [B,H,N,keys])."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value.repeat_interleave(groups, dim=1)).transpose(1, 2), weights


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention with rotated positions."""

    def __init__(self, config: PolicyConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.num_key_value_heads and config.head_dim and config.layer_types
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.softcap = config.attn_logit_softcapping
        self.is_causal = True
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=bool(config.attention_out_bias))
        self.use_qk_norm = config.use_qk_norm
        if config.use_qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def cache_spec(self) -> LayerCacheSpec:
        """Return what the layer keeps of a token: its rotated key and its value."""
        heads = self.config.num_key_value_heads
        assert heads is not None
        return LayerCacheSpec.of_heads(heads, self.head_dim, self.head_dim, window=self.sliding_window)

    def forward(
        self, hidden_states: Tensor, position_embeddings: Rotation, attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return attention of hidden states [B,N,hidden size], and the weights, if the attention function gives any."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key = self.q_proj(hidden_states).view(heads), self.k_proj(hidden_states).view(heads)
        if self.use_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query = rotate(query, position_embeddings).transpose(1, 2)
        key = rotate(key, position_embeddings).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
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
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights

"""Multi-head latent attention: the keys and values of all heads are expanded from one small latent of each token.

In training, and over padded batches, keys and values are expanded (the naive form). Decoding keeps the latents alone
and never expands them: as k = W_uk c, a query's product with a key is that of W_uk^T q with the latent, and the mixture
of values is W_uv times the mixture of latents (the absorbed form). That is multi-query attention with one kv head whose
value is the first numbers of its key.

Shapes: B batch (1 where there is a layout), N tokens, H heads, R size of the latent, dn and dr sizes of a head's parts
without and with rotation, dv size of a value's head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from alignlab.models.attention_layer import AttentionLayer
from alignlab.models.cache_spec import LayerCacheSpec
from alignlab.models.config import PolicyConfig
from alignlab.models.config_rules import require
from alignlab.models.layers import make_norm
from alignlab.models.layout import Layout, attention, keeps_latents
from alignlab.models.merging import weight_with_adapters
from alignlab.models.rope import Rotation, deinterleaved, latent_scale, rotate

SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
"""Fields of a config that a model with latent attention must give."""
FIELDS = ("q_lora_rank", *SIZES, "rope_interleave", "latent_norm_eps")
"""Fields of a config that mean something for latent attention alone."""


class LatentAttention(AttentionLayer):
    """Latent attention; names of weights are those of DeepSeek-V3 in `transformers`.

    Queries come from the hidden state, or through a latent of their own of size `q_lora_rank`. A token's key is dn
    numbers of its latent for each head, and dr numbers, rotated, that all heads share.

    Reference: DeepSeek-AI (2024), arXiv:2405.04434, Section 2.1; without rotation: Kimi Team (2025), arXiv:2510.26692.
    """

    def __init__(self, config: PolicyConfig, layer_idx: int) -> None:
        rank, nope, rope, value = (getattr(config, name) for name in SIZES)
        super().__init__(config, layer_idx, query_size=nope + rope, rotary_size=rope)
        self.interleaves = config.rope_interleave is not False
        self.scaling *= latent_scale(config) if self.rotary_size else 1.0
        heads, hidden = config.num_attention_heads, config.hidden_size
        self.num_heads, self.num_key_value_groups = heads, 1
        self.sizes = {"nope": nope, "rope": rope, "value": value, "latent": rank}
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * (nope + rope), bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=config.attention_bias)
            self.q_a_layernorm = make_norm(config, config.q_lora_rank, config.latent_norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * (nope + rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, rank + rope, bias=config.attention_bias)
        self.kv_a_layernorm = make_norm(config, rank, config.latent_norm_eps)
        self.kv_b_proj = nn.Linear(rank, heads * (nope + value), bias=False)
        self.o_proj = nn.Linear(heads * value, hidden, bias=bool(config.attention_out_bias))

    @classmethod
    def check_config(cls, config: PolicyConfig) -> None:
        """Raise a ConfigError if a size is missing, or the config has a norm of keys, which are never formed."""
        for name in SIZES:
            size = getattr(config, name)
            require(
                size is not None and size >= 1,
                f"{name} is {size}, and must be given where a layer is latent_attention; use {_EXAMPLES[name]}",
            )
        rope, rank = config.qk_rope_head_dim, config.q_lora_rank
        assert rope is not None
        require(rope % 2 == 0, f"qk_rope_head_dim is {rope}, and must be even for the rotation; use {rope + 1}")
        require(rank is None or rank >= 1, f"q_lora_rank is {rank}, and must be at least 1; leave it out for none")
        require(
            not config.use_qk_norm,
            "use_qk_norm is true, and must be false where a layer is latent_attention, whose decoding never forms the "
            "keys of single heads, and which norms its latents; leave it out",
        )
        require(
            not config.fused_projections,
            "fused_projections is true, and must be false where a layer is latent_attention, which projects through "
            "latents; leave it out",
        )

    def cache_spec(self) -> LayerCacheSpec:
        """Return what the layer keeps of a token: its latent after the norm, and the rotated part of its key."""
        rank = self.sizes["latent"]
        return LayerCacheSpec.of_latent(rank + self.sizes["rope"], rank, window=self.sliding_window)

    def layers_read_by_weight(self) -> list[nn.Module]:
        """Return the layers whose weights are read when latents are decoded, beside their forward pass."""
        return [self.kv_b_proj]

    def forward(
        self, hidden_states: Tensor, position_embeddings: Rotation | None, attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None, *, layout: Layout | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return attention of hidden states [B,N,hidden size], and the weights, if the attention function gives any.

        Args:
            position_embeddings: of `rotary_size`; None in a layer without positions.
        """
        query = self._query(hidden_states, position_embeddings)
        latent, key_rope = self._latent(hidden_states, position_embeddings)
        if keeps_latents(layout):
            output, weights = self._absorbed(query, torch.cat((latent, key_rope), -1), layout), None
        else:
            if past_key_values is not None:
                latent, key_rope = past_key_values.update(latent, key_rope, self.layer_idx)
            key, value = self._expanded(latent, key_rope)
            output, weights = self.attend(query, key, value, attention_mask, layout=layout, **kwargs)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights

    def _query(self, hidden_states: Tensor, rotation: Rotation | None) -> Tensor:
        """Return queries [B,H,N,dn+dr]."""
        if self.config.q_lora_rank is None:
            flat = self.q_proj(hidden_states)
        else:
            flat = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        nope, rope = flat.view(*hidden_states.shape[:-1], self.num_heads, -1).split(
            [self.sizes["nope"], self.sizes["rope"]], dim=-1
        )
        return torch.cat((nope, self._rotated(rope, rotation)), dim=-1).transpose(1, 2)

    def _latent(self, hidden_states: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """Return latents [B,1,N,R], and the part of the keys that all heads share [B,1,N,dr]."""
        latent, rope = self.kv_a_proj_with_mqa(hidden_states).split([self.sizes["latent"], self.sizes["rope"]], dim=-1)
        return self.kv_a_layernorm(latent)[:, None], self._rotated(rope[..., None, :], rotation).transpose(1, 2)

    def _rotated(self, heads: Tensor, rotation: Rotation | None) -> Tensor:
        if rotation is None:
            return heads
        return rotate(deinterleaved(heads) if self.interleaves else heads, rotation)

    def _expanded(self, latent: Tensor, key_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys [B,H,N,dn+dr] and values [B,H,N,dv] of all heads."""
        both = self.kv_b_proj(latent[:, 0]).view(latent.shape[0], latent.shape[2], self.num_heads, -1).transpose(1, 2)
        nope, value = both.split([self.sizes["nope"], self.sizes["value"]], dim=-1)
        return torch.cat((nope, key_rope.expand(-1, self.num_heads, -1, -1)), dim=-1), value

    def _absorbed(self, query: Tensor, latent: Tensor, layout: Layout | None) -> Tensor:
        """Return attention [1,N,H,dv] of queries [1,H,N,dn+dr] to cached latents, and to `latent` [1,1,N,R+dr]."""
        # Not `kv_b_proj.weight`: under an adapter that is the base's.
        weight = weight_with_adapters(self.kv_b_proj).view(self.num_heads, -1, self.sizes["latent"])
        to_key, to_value = weight.split([self.sizes["nope"], self.sizes["value"]], dim=1)
        nope, rope = query[0].split([self.sizes["nope"], self.sizes["rope"]], dim=-1)
        mixed, _ = attention(
            self, torch.cat((nope @ to_key, rope), dim=-1)[None], latent, None, None, scaling=self.scaling,
            sliding_window=self.sliding_window, softcap=self.softcap, s_aux=self.sinks, layout=layout,
        )
        return (mixed[0].transpose(0, 1) @ to_value.transpose(1, 2)).transpose(0, 1)[None]


_EXAMPLES = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}

"""Gated attention: a sigmoid gate on each number of the attention's output, computed from the same token.

Shapes: B batch (1 where there is a layout), N tokens, H heads, D head size.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers import Cache
from transformers.masking_utils import create_causal_mask, sliding_window_overlay

from alignlab.models.attention import Attention
from alignlab.models.config import PolicyConfig
from alignlab.models.config_rules import require
from alignlab.models.rope import Rotation, rotate


class GatedAttention(Attention):
    """Grouped-query attention with output * sigmoid(W_g x) before the output projection.

    Queries and gates are one projection, head by head: [D of the query, D of the gate]. So Qwen3-Next has them.

    Reference: Qiu et al. (2025), arXiv:2505.06708.
    """

    @classmethod
    def check_config(cls, config: PolicyConfig) -> None:
        """Raise a ConfigError if heads do not divide, or a gate would be normed or fused with what it gates."""
        super().check_config(config)
        require(
            config.qk_norm_scope == "head",
            "qk_norm_scope is all_heads, and must be head where a layer is gated_attention, whose projection of "
            "queries holds their gates head by head; leave it out",
        )
        require(
            not config.fused_projections,
            "fused_projections is true, and must be false where a layer is gated_attention; leave it out",
        )

    @classmethod
    def query_rows(cls, config: PolicyConfig) -> int:
        """Return the numbers that `q_proj` computes of a token: its queries and their gates."""
        return 2 * super().query_rows(config)

    def forward(
        self, hidden_states: Tensor, position_embeddings: Rotation | None, attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return attention of hidden states [B,N,hidden size], and the weights, if the attention function gives any.

        Args:
            position_embeddings: of `rotary_size`; None in a layer without positions.
        """
        shape = (*hidden_states.shape[:-1], -1)
        query, gate = self.q_proj(hidden_states).view(*shape, 2 * self.head_dim).chunk(2, dim=-1)
        key = self.k_proj(hidden_states).view(*shape, self.head_dim)
        if self.use_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        if position_embeddings is not None:
            query = rotate(query, position_embeddings, self.unrotated_size)
            key = rotate(key, position_embeddings, self.unrotated_size)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        value = self.v_proj(hidden_states).view(*shape, self.head_dim).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = self.attend(query, key, value, attention_mask, **kwargs)
        return self.o_proj(output.reshape(shape) * gate.reshape(shape).sigmoid()), weights


class SlidingGatedAttention(GatedAttention):
    """Gated attention to the last `config.sliding_window` tokens, the token itself included."""

    has_window: ClassVar[bool] = True

    @classmethod
    def make_mask(cls, config: PolicyConfig, **arguments: Any) -> Any:
        """Return the mask of an ordinary padded batch, whose cache holds all tokens."""
        assert config.sliding_window is not None
        overlay = sliding_window_overlay(config.sliding_window)
        return create_causal_mask(config=config, and_mask_function=overlay, **arguments)

"""Gated attention: a sigmoid gate on each number of the attention's output, computed from the same token.

Shapes: B batch (1 where there is a layout), N tokens, H heads, D head size.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers.masking_utils import create_causal_mask, sliding_window_overlay

from alignlab.models.attention import Attention
from alignlab.models.config import PolicyConfig


class GatedAttention(Attention):
    """Grouped-query attention with output * sigmoid(W_g x) before the output projection.

    Queries and gates are one projection, head by head: [D of the query, D of the gate]. So Qwen3-Next has them.

    Reference: Qiu et al. (2025), arXiv:2505.06708.
    """

    @classmethod
    def query_rows(cls, config: PolicyConfig) -> int:
        """Return the numbers that `q_proj` computes of a token: its queries and their gates."""
        return 2 * super().query_rows(config)

    def query_and_gate(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return queries [B,N,H,D], and the gate's logits [B,N,H*D]."""
        both = self.q_proj(hidden_states).view(*hidden_states.shape[:-1], -1, 2 * self.head_dim)
        query, gate = both.chunk(2, dim=-1)
        return query, gate.flatten(-2)


class SlidingGatedAttention(GatedAttention):
    """Gated attention to the last `config.sliding_window` tokens, the token itself included."""

    has_window: ClassVar[bool] = True

    @classmethod
    def make_mask(cls, config: PolicyConfig, **arguments: Any) -> Any:
        """Return the mask of an ordinary padded batch, whose cache holds all tokens."""
        assert config.sliding_window is not None
        overlay = sliding_window_overlay(config.sliding_window)
        return create_causal_mask(config=config, and_mask_function=overlay, **arguments)

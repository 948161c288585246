"""The base of all kinds of attention: layers whose queries meet the keys of earlier tokens.

The kinds that vLLM serves call the attention function in their own `forward`: vLLM reads the source of that method, and
puts its kernels there. The others call `attend`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import alignlab.models.layout  # noqa: F401  registers the attention function
from alignlab.models.config import PolicyConfig
from alignlab.models.mixing_layer import MixingLayer


class AttentionLayer(MixingLayer):
    """One layer's attention.

    Args:
        config: of the model.
        layer_idx: number of the layer.
        query_size: numbers of a query's head, whose products are scaled by 1 / sqrt(query_size), or by
            1 / sqrt(config.query_pre_attn_scalar) where that is given.
        rotary_size: numbers of a head that are rotated by positions, in the layers that rotate.

    Attributes:
        rotary_size: as above; None in a layer without positions (`config.no_rope_layers`).
        local_rope: the layer rotates by `config.rope_local_base_freq`.
        sinks: [heads], a logit of each head that takes a share of the softmax and adds nothing to the output, or None.
    """

    def __init__(self, config: PolicyConfig, layer_idx: int, *, query_size: int, rotary_size: int) -> None:
        super().__init__(config, layer_idx)
        self.scaling = (config.query_pre_attn_scalar or query_size) ** -0.5
        self.attention_dropout = config.attention_dropout
        self.softcap = config.attn_logit_softcapping
        self.is_causal = True
        self.sliding_window = config.sliding_window if self.has_window else None
        self.rotary_size = rotary_size if config.rotates(layer_idx) else None
        self.local_rope = self.has_window and config.rope_local_base_freq is not None
        self.sinks = nn.Parameter(torch.zeros(config.num_attention_heads)) if config.attention_sinks else None

    @classmethod
    def make_mask(cls, config: PolicyConfig, **arguments: Any) -> Any:
        """Return the mask of an ordinary padded batch, from the arguments of `transformers`' `create_causal_mask`."""
        return create_causal_mask(config=config, **arguments)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the config's attention function does: output [B,N,H,V], and the weights, if it gives any."""
        function: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = function(
            self, query, key, value, attention_mask, dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling, sliding_window=self.sliding_window, softcap=self.softcap, s_aux=self.sinks, **kwargs,
        )
        return output, weights

    def initialize(self) -> None:
        """Draw the sinks."""
        if self.sinks is not None:
            init.normal_(self.sinks, std=self.config.initializer_range)


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    *, scaling: float, dropout: float = 0.0, softcap: float | None = None, s_aux: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Compute attention step by step, as `attn_implementation="eager"` asks: ([B,N,H,V], weights [B,H,N,keys])."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    exact = torch.promote_types(query.dtype, torch.float32)
    if s_aux is None:
        weights = nn.functional.softmax(scores, dim=-1, dtype=exact).to(query.dtype)
    else:
        sinks = s_aux.to(exact).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat((scores.to(exact), sinks), dim=-1).softmax(-1)[..., :-1].to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value.repeat_interleave(groups, dim=1)).transpose(1, 2), weights

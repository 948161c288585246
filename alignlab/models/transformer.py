"""The in-house policy: a decoder whose attention and feed-forward the config chooses one layer at a time.

Attention is looked up in `transformers`' ALL_ATTENTION_FUNCTIONS, with the layout of the tokens passed down by keyword:
the same module trains on packed sequences, decodes from a paged cache and generates as any model of `transformers`.
Names of weights are those of the Hub family that a config is isomorphic to.

Shapes: B batch (1 where there is a layout), N tokens, H heads, K kv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

import alignlab.models.attention  # noqa: F401  registers the attention function
from alignlab.errors import ConfigError
from alignlab.models.config import PolicyConfig
from alignlab.models.layers import FeedForward, RMSNorm
from alignlab.models.moe import Experts, Router, RoutingRecord, SparseFeedForward
from alignlab.models.rope import RotaryEmbedding, Rotation, rope_frequencies, rotate


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    *, scaling: float, dropout: float = 0.0, softcap: float | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention spelled out: what "eager" means for this model. Returns ([B,N,H,D], weights [B,H,N,keys])."""
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

    def forward(
        self, hidden_states: Tensor, position_embeddings: Rotation, attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of hidden states [B,N,hidden size], and its weights where the attention function gives them."""
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


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm: attention and feed-forward, each added to the stream."""

    def __init__(self, config: PolicyConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.mlp_layer_types is not None
        self.self_attn = Attention(config, layer_idx)
        self.sparse = config.mlp_layer_types[layer_idx] == "sparse"
        self.mlp: nn.Module
        if self.sparse:
            self.mlp = SparseFeedForward(config, config.sparse_layers.index(layer_idx))
        else:
            self.mlp = FeedForward(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, *, routing: RoutingRecord | None = None, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + (self.mlp(normed, routing) if self.sparse else self.mlp(normed))


class PolicyPreTrainedModel(PreTrainedModel):
    """What `transformers`, accelerate and vLLM ask of a model class."""

    config: PolicyConfig
    config_class = PolicyConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False
    _can_record_outputs = {"hidden_states": DecoderLayer, "attentions": Attention}  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["e_score_correction_bias", "expert_load"]  # noqa: RUF012
    _keys_to_ignore_on_load_missing = [r"mlp\.gate\.expert_load"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RotaryEmbedding):
            init.copy_(module.inv_freq, rope_frequencies(self.config)[0])
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, std=self.config.initializer_range)
            init.normal_(module.down_proj, std=self.config.initializer_range)
        elif isinstance(module, Router):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.constant_(module.expert_load, 1 / self.config.num_experts)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)
        else:
            super()._init_weights(module)


class PolicyModel(PolicyPreTrainedModel):
    """The decoder: embeddings, layers, final norm.

    The embedding has no padding index, so that a model whose padding token is its end token still learns that row.
    """

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Any = None, position_ids: Tensor | None = None,
        *, past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None, use_cache: bool | None = None,
        routing: RoutingRecord | None = None, **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Final hidden states.

        Args:
            input_ids, position_ids: [B,N]; B is 1 where there is a layout, whose own positions must be given.
            attention_mask: [B,N] padding, or a mask ready to use; not read where there is a layout.
            routing: expert choices to replay, and where this pass's choices and router losses are put.
            kwargs: go to the attention function; `layout` says how packed or paged tokens belong together.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + hidden_states.shape[1], device=hidden_states.device)[None]
        masks = self._masks(attention_mask, hidden_states, past_key_values, position_ids, kwargs.get("layout"))
        routing = self._begin_routing(routing)
        rotation = self.rotary_emb(position_ids, hidden_states.dtype)
        for layer, kind in zip(self.layers, self.config.layer_types or (), strict=True):
            hidden_states = layer(
                hidden_states, attention_mask=masks[kind], position_embeddings=rotation, position_ids=position_ids,
                past_key_values=past_key_values, use_cache=use_cache, routing=routing, **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _begin_routing(self, routing: RoutingRecord | None) -> RoutingRecord | None:
        """The pass's record. Training always has one: activation checkpointing must find the choices it made."""
        counting = self.training and torch.is_grad_enabled() and bool(self.config.sparse_layers)
        if routing is None and not counting:
            return None
        routing = RoutingRecord() if routing is None else routing
        routing.begin(counting=counting)
        return routing

    def _masks(
        self, mask: Any, hidden_states: Tensor, cache: Cache | None, position_ids: Tensor, layout: Any
    ) -> dict[str, Any]:
        """The mask of each type of layer. A layout needs none; `generate` may have made them."""
        if layout is not None or isinstance(mask, dict):
            return mask if isinstance(mask, dict) else dict.fromkeys(set(self.config.layer_types or ()), None)
        if self.config.attn_logit_softcapping is not None and self.config._attn_implementation == "sdpa":
            raise ConfigError(
                "attn_logit_softcapping is set, and attn_implementation is 'sdpa', which has no soft-cap; "
                "use 'alignlab' or 'eager'"
            )
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        return {
            kind: makers[kind](
                config=self.config, inputs_embeds=hidden_states, attention_mask=mask, past_key_values=cache,
                position_ids=position_ids,
            )
            for kind in set(self.config.layer_types or ())
        }


class PolicyForCausalLM(PolicyPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__(config)
        self.model = PolicyModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Any = None, position_ids: Tensor | None = None,
        *, past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, logits_to_keep: int | Tensor = 0, **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B,N,V] (of the last `logits_to_keep` tokens), and the cross-entropy where `labels` are given."""
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        cap = self.config.final_logit_softcapping
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states, attentions=outputs.attentions,
        )

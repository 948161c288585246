"""The in-house policy: a decoder whose attention and feed-forward the config chooses one layer at a time.

The layout of the tokens is passed down to the attention function by keyword (see `layout`): the same module trains on
packed sequences, decodes from a paged cache and generates like any model of `transformers`. Names of weights are those
of the Hub family that a config stands for.

Shapes: B batch (1 where there is a layout), N tokens, V vocabulary.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from alignlab.errors import ConfigError
from alignlab.models.attention_kinds import ATTENTION_KINDS, check_cache
from alignlab.models.attention_layer import AttentionLayer
from alignlab.models.config import PolicyConfig
from alignlab.models.decoder_layer import DecoderLayer
from alignlab.models.layers import ZeroCenteredRMSNorm, make_norm
from alignlab.models.mixing_layer import MixingLayer
from alignlab.models.mixture_of_heads import ExpertProjection
from alignlab.models.moe import BiasedExperts, Experts
from alignlab.models.mtp import MultiTokenPrediction
from alignlab.models.recurrent.convolution import ShortConvolution
from alignlab.models.recurrent.layer import RecurrentLayer
from alignlab.models.rope import RotaryEmbedding, Rotation
from alignlab.models.routers.topk import TopKRouter
from alignlab.models.routers.uses import check_cached_pass
from alignlab.models.routing import RoutingRecord
from alignlab.types import Segments

_SINGLE = torch.float32  # in which `transformers` holds a multiplier of embeddings


class PolicyPreTrainedModel(PreTrainedModel):
    """Class attributes and initialisation that `transformers`, accelerate and vLLM expect of a model."""

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
    _can_record_outputs = {"hidden_states": DecoderLayer, "attentions": AttentionLayer}  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["e_score_correction_bias", "expert_load", "group_load"]  # noqa: RUF012
    _keys_to_ignore_on_load_missing = [r"mlp\.(gate|router)\.(expert_load|group_load|noise_key)"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RotaryEmbedding):
            init.copy_(module.inv_freq, module.frequencies())
        elif isinstance(module, ZeroCenteredRMSNorm):
            init.zeros_(module.weight)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, std=self.config.initializer_range)
            init.normal_(module.down_proj, std=self.config.initializer_range)
            if isinstance(module, BiasedExperts):
                init.zeros_(module.gate_up_proj_bias)
                init.zeros_(module.down_proj_bias)
        elif isinstance(module, TopKRouter | MixingLayer):
            module.initialize()
        elif isinstance(module, ShortConvolution):
            module.reset_parameters()
        elif isinstance(module, ExpertProjection):
            module.initialize()
        else:
            super()._init_weights(module)


class PolicyModel(PolicyPreTrainedModel):
    """The decoder: embeddings, layers, final norm.

    The embedding has no padding index: a model whose padding token is its end token must still train that row.
    """

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = config.layer_blocks
        self.layers = nn.ModuleList([DecoderLayer(config, blocks.index(block)) for block in range(max(blocks) + 1)])
        self.norm = make_norm(config, config.hidden_size)
        mixing = [module for module in self.layers.modules() if isinstance(module, MixingLayer)]
        rotations = {str(m.rotation_key): (m.rotary_size, m.local_rope) for m in mixing if m.rotary_size}
        self.rotary_embs = nn.ModuleDict(
            {key: RotaryEmbedding(config, size, local=local) for key, (size, local) in rotations.items()}
        )
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Any = None, position_ids: Tensor | None = None,
        *, past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None, use_cache: bool | None = None,
        routing: RoutingRecord | None = None, **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the final hidden states.

        Args:
            input_ids, position_ids: [B,N]; B is 1 where there is a layout, whose own positions must be given.
            inputs_embeds: [B,N,hidden size] instead of ids, multiplied already where the config has a multiplier.
            attention_mask: [B,N] padding, or a mask ready to use; not read where there is a layout.
            routing: expert choices to replay; the pass writes its choices and router losses into it.
            kwargs: go to the attention function; `layout` says how packed or paged tokens belong together.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        hidden_states = self.embedded(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            start = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(start, start + hidden_states.shape[1], device=hidden_states.device)[None]
        masks = self._masks(attention_mask, hidden_states, past_key_values, position_ids, kwargs.get("layout"))
        check_cached_pass(self.config, past_key_values)
        routing = self._begin_routing(routing, input_ids, kwargs.get("layout"))
        rotations = self.rotations(position_ids, hidden_states.dtype)
        blocks, kinds = self.config.layer_blocks, self.config.layer_types or ()
        for index, (block, kind) in enumerate(zip(blocks, kinds, strict=True)):
            hidden_states = self.layers[block](
                hidden_states, attention_mask=masks[kind], rotations=rotations, position_ids=position_ids,
                past_key_values=past_key_values, use_cache=use_cache, routing=routing,
                layer_idx=None if self.config.shared_layers is None else index, **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def rotations(self, position_ids: Tensor, dtype: torch.dtype) -> dict[str, Rotation]:
        """Return the rotations by positions [B,N] of all layers, by `MixingLayer.rotation_key`."""
        return {key: rotary(position_ids, dtype) for key, rotary in self.rotary_embs.items()}

    def embedded(self, input_ids: Tensor | None) -> Tensor:
        """Return the embeddings of tokens, times `config.embedding_multiplier` rounded to their dtype."""
        embedded: Tensor = self.embed_tokens(input_ids)
        multiplier = self.config.embedding_multiplier
        return embedded if multiplier is None else embedded * rounded_multiplier(multiplier, embedded.dtype)

    def _begin_routing(
        self, routing: RoutingRecord | None, ids: Tensor | None, layout: Any
    ) -> RoutingRecord | None:
        """Return the record of a forward pass; in training always one, from which activation checkpointing repeats."""
        counting = self.training and torch.is_grad_enabled() and self.config.num_routers > 0
        if routing is None and not counting and self.config.router_type != "hash":
            return None
        routing = RoutingRecord() if routing is None else routing
        routing.begin(counting=counting, ids=ids, segments=layout if isinstance(layout, Segments) else None)
        return routing

    def _masks(
        self, mask: Any, hidden_states: Tensor, cache: Cache | None, position_ids: Tensor, layout: Any
    ) -> dict[str, Any]:
        """Return the mask of each type of layer; None with a layout. `generate` may have made them already."""
        if layout is not None or isinstance(mask, dict):
            return mask if isinstance(mask, dict) else dict.fromkeys(set(self.config.layer_types or ()), None)
        self._check_implementation(self.config._attn_implementation)
        arguments = {
            "inputs_embeds": hidden_states, "attention_mask": mask, "past_key_values": cache,
            "position_ids": position_ids,
        }
        return {
            kind: ATTENTION_KINDS[kind].make_mask(self.config, **arguments)
            for kind in set(self.config.layer_types or ())
        }

    def _check_implementation(self, name: str | None) -> None:
        """Raise if the attention function of this name lacks what the config asks for."""
        fix = "use 'alignlab' or 'eager'"
        if self.config.attn_logit_softcapping is not None and name == "sdpa":
            raise ConfigError(
                f"attn_logit_softcapping is set, and attn_implementation is 'sdpa', which has no soft-cap; {fix}"
            )
        if self.config.attention_sinks and name not in ("alignlab", "eager", "vllm"):
            raise ConfigError(f"attention_sinks is true, and attn_implementation is {name!r}, which has none; {fix}")


@cache
def rounded_multiplier(multiplier: float, dtype: torch.dtype) -> float:
    """Return a multiplier of embeddings as the dtype holds it, rounded to float32 first.

    In bfloat16, sqrt(3072) is 55.5: Gemma was trained with that number, and `transformers` multiplies by it.
    """
    return torch.tensor(multiplier, dtype=_SINGLE, device="cpu").to(dtype).item()


class PolicyForCausalLM(PolicyPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__(config)
        self.model = PolicyModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = MultiTokenPrediction(config) if config.num_mtp_layers else None
        # `generate` refuses by it to guess tokens ahead: a state cannot be taken back to an earlier token.
        self._is_stateful = any(isinstance(module, RecurrentLayer) for module in self.modules())
        self.post_init()

    def _prepare_cache_for_generation(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Make the cache of `generate`; refuse one that has no place for what a kind of layer keeps."""
        check_cache(self.config, generation_config.cache_implementation)
        prepare: Any = GenerationMixin._prepare_cache_for_generation
        return prepare(self, generation_config, *args, **kwargs)

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Any = None, position_ids: Tensor | None = None,
        *, past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, logits_to_keep: int | Tensor = 0, **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [B,N,V] (of the last `logits_to_keep` tokens), and the cross-entropy if `labels` are given."""
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, positions, :])
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


AutoConfig.register(PolicyConfig.model_type, PolicyConfig, exist_ok=True)
AutoModel.register(PolicyConfig, PolicyModel, exist_ok=True)
AutoModelForCausalLM.register(PolicyConfig, PolicyForCausalLM, exist_ok=True)

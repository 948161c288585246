"""What a model computes beside its weights: the fields of its config on which its output depends."""

from __future__ import annotations

from typing import Any

from torch import nn

from alignlab.digests import as_json
from alignlab.models.attention import causal_lm

_ASIDE = frozenset({
    "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "return_dict",
    "output_hidden_states", "output_attentions", "id2label", "label2id", "problem_type", "initializer_range",
    "max_position_embeddings", "hub_config", "pad_token_id", "bos_token_id", "chunk_size_feed_forward",
})  # fmt: skip
"""Fields that say where a model comes from, how it was made, or how it is called."""


def model_settings(model: nn.Module) -> dict[str, Any]:
    """Return the fields of a language model's config on which its output depends, as JSON, by name."""
    config = causal_lm(model).config.to_dict()
    return {name: as_json(value) for name, value in sorted(config.items()) if name not in _ASIDE}

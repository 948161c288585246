"""The kinds of attention that a config may name in `layer_types`, each with its class: the one table of them."""

from __future__ import annotations

from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer

from alignlab.models.attention import Attention, SlidingAttention
from alignlab.models.attention_layer import AttentionLayer
from alignlab.models.config import PolicyConfig
from alignlab.models.gated_attention import GatedAttention, SlidingGatedAttention
from alignlab.models.latent_attention import LatentAttention

ATTENTION_KINDS: dict[str, type[AttentionLayer]] = {
    "full_attention": Attention,
    "sliding_attention": SlidingAttention,
    "gated_attention": GatedAttention,
    "sliding_gated_attention": SlidingGatedAttention,
    "latent_attention": LatentAttention,
}


def make_attention(config: PolicyConfig, layer_idx: int) -> AttentionLayer:
    """Return the attention of a layer, of the kind that the config names."""
    assert config.layer_types is not None
    return ATTENTION_KINDS[config.layer_types[layer_idx]](config, layer_idx)  # type: ignore[call-arg]


for kind in ATTENTION_KINDS:  # `generate` makes a cache by these names
    DYNAMIC_LAYER_TYPE_MAPPING.setdefault(kind, DynamicLayer)

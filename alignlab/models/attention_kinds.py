"""The kinds of layers that a config may name in `layer_types`, each with its class: the one table of them."""

from __future__ import annotations

from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING, DynamicLayer
from transformers.generation.configuration_utils import STATIC_CACHE_IMPLEMENTATIONS

from alignlab.models.attention import Attention, SlidingAttention
from alignlab.models.config import PolicyConfig
from alignlab.models.config_rules import require
from alignlab.models.gated_attention import GatedAttention, SlidingGatedAttention
from alignlab.models.latent_attention import LatentAttention
from alignlab.models.mixing_layer import MixingLayer
from alignlab.models.mixture_of_heads import MixtureOfHeads
from alignlab.models.recurrent.gated_deltanet import FusedGatedDeltaNet, GatedDeltaNet
from alignlab.models.recurrent.generation_cache import RecurrentCacheLayer
from alignlab.models.recurrent.kimi_delta import KimiDeltaAttention
from alignlab.models.recurrent.layer import RecurrentLayer

ATTENTION_KINDS: dict[str, type[MixingLayer]] = {
    "full_attention": Attention,
    "sliding_attention": SlidingAttention,
    "gated_attention": GatedAttention,
    "sliding_gated_attention": SlidingGatedAttention,
    "latent_attention": LatentAttention,
    "mixture_of_heads": MixtureOfHeads,
    "gated_deltanet": GatedDeltaNet,
    "fused_gated_deltanet": FusedGatedDeltaNet,
    "kimi_delta_attention": KimiDeltaAttention,
}


def make_attention(config: PolicyConfig, layer_idx: int) -> MixingLayer:
    """Return the layer that mixes the tokens, of the kind that the config names."""
    assert config.layer_types is not None
    return ATTENTION_KINDS[config.layer_types[layer_idx]](config, layer_idx)


def check_cache(config: PolicyConfig, implementation: str | None) -> None:
    """Raise if `generate` cannot make a cache of an implementation for the layers of a config.

    Raises:
        ConfigError: it is a static one, of which `transformers` has none for a kind of layer.
    """
    others = sorted(set(config.layer_types or ()) - STATIC_LAYER_TYPE_MAPPING.keys())
    require(
        implementation not in STATIC_CACHE_IMPLEMENTATIONS or not others,
        f"cache_implementation is {implementation}, and there is no static cache for {', '.join(others)}; leave it "
        "out, or use 'dynamic'",
    )


for name, kind in ATTENTION_KINDS.items():  # `generate` makes a cache by these names
    cache_layer = RecurrentCacheLayer if issubclass(kind, RecurrentLayer) else DynamicLayer
    DYNAMIC_LAYER_TYPE_MAPPING.setdefault(name, cache_layer)

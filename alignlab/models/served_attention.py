"""What of our models vLLM can compute: its own kernels take the place of the attention function there."""

from __future__ import annotations

from typing import Any

from alignlab.models.config import PolicyConfig
from alignlab.models.config_rules import require
from alignlab.models.hub.families import write_hub_config

SERVED_KINDS = ("full_attention", "sliding_attention")
"""Kinds that vLLM knows by name, and caches keys and values for; rotation is computed by our layers there too."""
SERVED_BLOCKS: dict[str, Any] = {
    "norm_type": "rmsnorm",  # vLLM puts its own in the place of another, without the 1 + weight
    "norm_position": "pre",
    "parallel_attn": False,
    "shared_layers": None,
    "hidden_act": "silu",
    "mlp_gated": True,
    "fused_projections": False,
    "qk_norm_scope": "head",
    "query_pre_attn_scalar": None,
    "embedding_multiplier": None,
    "rope_local_base_freq": None,
    "router_linear_bias": False,
    "swiglu_limit": None,
}
"""Values of fields with which our own layers run inside vLLM; a model of a Hub family runs as vLLM's class of it."""


def check_served(config: PolicyConfig) -> None:
    """Raise if vLLM cannot compute a config's attention or blocks.

    Raises:
        ConfigError: a kind of layer is not known to vLLM; or no Hub family has the model's blocks, and our own layers
            cannot compute them there.
    """
    require(
        config.num_mtp_layers == 0,
        f"num_mtp_layers is {config.num_mtp_layers}, and vLLM holds no such layer, so that its weights could not be "
        "verified; use rollout.engine: embedded, or a model without that layer",
    )
    require(
        not config.expert_bias,
        "expert_bias is true, and vLLM 0.32 fails at an update of such experts, as was seen on a CPU; use "
        "rollout.engine: embedded",
    )
    others = sorted(set(config.layer_types or ()) - set(SERVED_KINDS))
    require(
        not others,
        f"layer_types holds {', '.join(others)}, and vLLM serves {' and '.join(SERVED_KINDS)} of our models; "
        "use rollout.engine: embedded",
    )
    unserved = [name for name, served in SERVED_BLOCKS.items() if getattr(config, name) != served]
    require(
        not unserved or write_hub_config(config) is not None,
        f"{', '.join(f'{name} is {getattr(config, name)}' for name in unserved)}, which vLLM serves of models of a Hub "
        "family alone, and this model is of none; use rollout.engine: embedded, or "
        f"{', '.join(f'{name}: {SERVED_BLOCKS[name]}' for name in unserved)}",
    )

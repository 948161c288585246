"""The parts of our models that vLLM can compute: its own kernels take the place of the attention function there."""

from __future__ import annotations

from typing import Any

import torch

from alignlab.models.config import PolicyConfig
from alignlab.models.config_rules import require
from alignlab.models.hub.families import write_hub_config

SERVED_KINDS = ("full_attention", "sliding_attention")
"""Kinds that vLLM knows by name, and caches keys and values for; rotation is computed by our layers there too."""
FAMILY_KINDS = (
    "latent_attention", "gated_attention", "gated_deltanet", "fused_gated_deltanet", "kimi_delta_attention",
)  # fmt: skip
"""Kinds that vLLM computes in its own classes of Hub families alone."""
WRONG_ON_CPU = {
    "deepseek_v2": "computes latent attention wrongly there, by 0.4 nats a token as measured",
    "deepseek_v3": "computes latent attention wrongly there, by 0.3 nats a token as measured",
    "kimi_linear": "needs Triton's kernels for it, which do not load there",
    "qwen3_5_text": "wants torchvision for it, which its build for CPUs is without",
}
"""What vLLM 0.32 does on a CPU with a family, by `model_type`."""
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
        ConfigError: a kind of layer is not known to vLLM, or in a Hub family alone, of which the model is none; or no
            Hub family has the model's blocks, and our own layers cannot compute them there.
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
    kinds = set(config.layer_types or ())
    others = sorted(kinds - {*SERVED_KINDS, *FAMILY_KINDS})
    require(
        not others,
        f"layer_types holds {', '.join(others)}, and vLLM serves {', '.join(SERVED_KINDS + FAMILY_KINDS)}; "
        "use rollout.engine: embedded",
    )
    hub = write_hub_config(config)
    of_family = sorted(kinds.intersection(FAMILY_KINDS))
    require(
        not of_family or hub is not None,
        f"layer_types holds {', '.join(of_family)}, which vLLM serves in models of a Hub family alone, and this model "
        "is of none; use rollout.engine: embedded",
    )
    require(
        "latent_attention" not in kinds or config.rope_interleave is not False,
        "rope_interleave is false, and vLLM rotates latent attention's neighbouring numbers together; use "
        "rollout.engine: embedded",
    )
    unserved = [name for name, served in SERVED_BLOCKS.items() if getattr(config, name) != served]
    require(
        not unserved or hub is not None,
        f"{', '.join(f'{name} is {getattr(config, name)}' for name in unserved)}, which vLLM serves of models of a Hub "
        "family alone, and this model is of none; use rollout.engine: embedded, or "
        f"{', '.join(f'{name}: {SERVED_BLOCKS[name]}' for name in unserved)}",
    )


def check_served_on_cpu(config: PolicyConfig, dtype: torch.dtype) -> None:
    """Raise if vLLM's build for CPUs cannot compute a model that `check_served` lets pass.

    Raises:
        ConfigError: the model is of a family that fails there, or that is computed in bfloat16 alone.
    """
    hub = write_hub_config(config)
    family = None if hub is None else hub.model_type
    require(
        family not in WRONG_ON_CPU,
        f"the model is of the family {family}, and vLLM 0.32 on a CPU {WRONG_ON_CPU.get(family or '')}; use "
        "rollout.engine: embedded, or a GPU",
    )
    require(
        family != "qwen3_next" or dtype == torch.bfloat16,
        f"the model is of the family qwen3_next in {str(dtype).removeprefix('torch.')}, and vLLM on a CPU computes "
        "Gated DeltaNet in bfloat16 alone; use model.dtype: bfloat16, or rollout.engine: embedded",
    )

"""The attention of our models that vLLM can compute: its own kernels take the place of the attention function there."""

from __future__ import annotations

from alignlab.models.config import PolicyConfig
from alignlab.models.config_rules import require

SERVED_KINDS = ("full_attention", "sliding_attention")
"""Kinds that vLLM knows by name, and caches keys and values for; rotation is computed by our layers there too."""


def check_served(config: PolicyConfig) -> None:
    """Raise if vLLM cannot compute a config's attention.

    Raises:
        ConfigError: a kind of layer is not known to vLLM.
    """
    others = sorted(set(config.layer_types or ()) - set(SERVED_KINDS))
    require(
        not others,
        f"layer_types holds {', '.join(others)}, and vLLM serves {' and '.join(SERVED_KINDS)} of our models; "
        "use rollout.engine: embedded",
    )

"""vLLM's plug-in entry point, loaded in each of its processes: our own model shapes, and weight updates.

With the plug-in, `vllm serve` runs a checkpoint of ours that no Hub family describes.
"""

from __future__ import annotations


def register() -> None:
    """Register our architecture with vLLM; vLLM may call this several times."""
    from vllm import ModelRegistry

    import alignlab.models.hub.checkpoints  # noqa: F401  registers the config and the model with transformers
    from alignlab.rollout.vllm.inside import transfer

    transfer.register()
    if "PolicyForCausalLM" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("PolicyForCausalLM", "alignlab.rollout.vllm.inside.model:ServedPolicy")

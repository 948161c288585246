"""What vLLM loads in each of its processes, by its plug-in entry point: our own shapes of models, and weight updates.

With it `vllm serve` runs a checkpoint of ours that no Hub family describes.
"""

from __future__ import annotations


def register() -> None:
    """Teach vLLM our architecture; called by vLLM, any number of times."""
    from vllm import ModelRegistry

    import alignlab.models.checkpoints  # noqa: F401  registers the config and the model with transformers
    from alignlab.rollout.vllm import transfer

    transfer.register()
    if "PolicyForCausalLM" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("PolicyForCausalLM", "alignlab.rollout.vllm.model:ServedPolicy")

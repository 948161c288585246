"""Our own decoder inside vLLM: its layers and its router as they are, attention, linears and experts vLLM's.

vLLM's backend for `transformers` models does that; it also rewrites the decoder's class for torch.compile, in the whole
process, in which the trainer may have a decoder of the same class. So it is given a class of its own to rewrite.
"""

from __future__ import annotations

from typing import Any, Self

from transformers import AutoModel
from vllm.config import VllmConfig
from vllm.model_executor.models.transformers import TransformersForCausalLM, TransformersMoEForCausalLM

from alignlab.models.config import PolicyConfig
from alignlab.models.transformer import PolicyModel


class ServedConfig(PolicyConfig):
    """A `PolicyConfig` whose model is `ServedModel`."""

    model_type = "alignlab_served_policy"


class ServedModel(PolicyModel):
    """The decoder that vLLM may rewrite."""

    config_class = ServedConfig


AutoModel.register(ServedConfig, ServedModel, exist_ok=True)


class ServedPolicy(TransformersForCausalLM):
    """A policy without experts; making one of a policy with experts gives a `ServedSparsePolicy`."""

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> Self | ServedSparsePolicy:
        """The class that fits the config."""
        _serve(vllm_config)
        if vllm_config.model_config.hf_config.sparse_layers:
            return ServedSparsePolicy(vllm_config=vllm_config, prefix=prefix)
        return super().__new__(cls)


class ServedSparsePolicy(TransformersMoEForCausalLM):
    """A policy with experts in some layers."""


def _serve(vllm_config: VllmConfig) -> None:
    """Let vLLM's config describe the same shape as one of our served ones."""
    config: Any = vllm_config.model_config.hf_config
    if type(config) is PolicyConfig:
        config.__class__ = ServedConfig

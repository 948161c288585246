"""Our own decoder inside vLLM: our layers and router, with vLLM's attention, linear layers and experts.

vLLM's backend for `transformers` models does this. It also rewrites the decoder's class for torch.compile, for the
whole process. The trainer may use that class in the same process, so vLLM gets a subclass of its own.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from transformers import AutoModel
from vllm.config import VllmConfig
from vllm.model_executor.models.transformers import TransformersForCausalLM, TransformersMoEForCausalLM

from alignlab.models.config import PolicyConfig
from alignlab.models.served_attention import check_served
from alignlab.models.transformer import PolicyModel


class ServedConfig(PolicyConfig):
    """A `PolicyConfig` whose model is `ServedModel`."""

    model_type = "alignlab_served_policy"
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        f"layers.*.mlp.{block}{layer}": "rowwise" if layer == "down_proj" else "colwise"
        for block in ("", "shared_experts.")
        for layer in ("gate_proj", "up_proj", "down_proj")
    }
    """Parts of linear layers by worker, where several share the model; vLLM finds those of attention and experts."""


class ServedModel(PolicyModel):
    """The decoder class that vLLM may rewrite."""

    config_class = ServedConfig


AutoModel.register(ServedConfig, ServedModel, exist_ok=True)


class ServedPolicy(TransformersForCausalLM):
    """A policy without experts; for a config with experts, the constructor returns a `ServedSparsePolicy`."""

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> Self | ServedSparsePolicy:
        """Return an instance of the class that fits the config."""
        _use_served_config(vllm_config)
        if vllm_config.model_config.hf_config.sparse_layers:
            return ServedSparsePolicy(vllm_config=vllm_config, prefix=prefix)
        return super().__new__(cls)


class ServedSparsePolicy(TransformersMoEForCausalLM):
    """A policy with experts in some layers."""


def _use_served_config(vllm_config: VllmConfig) -> None:
    """Turn our config inside vLLM's into a `ServedConfig` of the same shape.

    Raises:
        ConfigError: its attention is of a kind that vLLM cannot compute.
    """
    config: Any = vllm_config.model_config.hf_config
    check_served(config)
    if type(config) is PolicyConfig:
        config.__class__ = ServedConfig

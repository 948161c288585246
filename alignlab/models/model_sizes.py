"""The costs of a model, from its shape: parameters, arithmetic and cache of a token, state of a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from alignlab.models.cache_spec import cache_specs
from alignlab.models.config import PolicyConfig
from alignlab.models.mixture_of_heads import ExpertProjection
from alignlab.models.moe import Experts
from alignlab.models.routers.topk import TopKRouter
from alignlab.models.transformer import PolicyForCausalLM


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model.

    Attributes:
        parameters: numbers in all weights; a tied head counts once.
        active_parameters: those that multiply a token, the embeddings left out, and the head included; those of layers
            that share weights once.
        flops_per_token: of the products with weights in a forward pass; attention's own products, which grow with the
            context, are not in it.
        cache_bytes_per_token: kept of each token in bfloat16, if none has left a window.
        state_bytes: kept of each sequence in a bfloat16 model.
        aspect_ratio: hidden size over the number of layers.
    """

    parameters: int
    active_parameters: int
    flops_per_token: int
    cache_bytes_per_token: int
    state_bytes: int
    aspect_ratio: float


def model_sizes(config: PolicyConfig) -> ModelSizes:
    """Return the sizes of the model that a config describes; no memory is taken for its weights."""
    with init_empty_weights(include_buffers=True):
        model = PolicyForCausalLM(config)
    model.tie_weights()
    active = sum(_active(module, config) for module in model.modules())
    of_blocks = [sum(_active(module, config) for module in layer.modules()) for layer in model.model.layers]
    repeated = sum(of_blocks[block] for block in config.layer_blocks) - sum(of_blocks)
    specs = cache_specs(model).values()
    return ModelSizes(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        active_parameters=active,
        flops_per_token=2 * (active + repeated),
        cache_bytes_per_token=2 * sum(spec.token_numel for spec in specs),
        state_bytes=sum(spec.sequence_bytes(torch.bfloat16) for spec in specs),
        aspect_ratio=config.hidden_size / config.num_hidden_layers,
    )


def _active(module: nn.Module, config: PolicyConfig) -> int:
    """Return the numbers of a module's own weights that multiply a token; those of its children are not in it."""
    if isinstance(module, Experts):
        chosen = config.num_experts_per_tok / config.num_experts
        return round(chosen * sum(weight.numel() for weight in module.parameters(recurse=False)))
    if isinstance(module, ExpertProjection):
        assert config.num_attention_experts is not None
        return module.weight.numel() // config.num_attention_experts * config.num_attention_heads
    if isinstance(module, nn.Linear | TopKRouter):
        return sum(weight.numel() for weight in module.parameters(recurse=False))
    return 0


COLUMNS = ("preset", "paper", "parameters", "active", "FLOPs a token", "cache B a token", "state KiB", "aspect ratio")
"""Columns of a table of sizes."""


def row(name: str, paper: str, sizes: ModelSizes) -> tuple[Any, ...]:
    """Return the cells of `COLUMNS`."""
    return (
        name, f"arXiv:{paper}", f"{sizes.parameters:,}", f"{sizes.active_parameters:,}",
        f"{sizes.flops_per_token:,}", f"{sizes.cache_bytes_per_token:,}", f"{sizes.state_bytes / 1024:.1f}",
        f"{sizes.aspect_ratio:g}",
    )  # fmt: skip


"""Patches of vLLM's faults at weight updates, each with version, platform and reason.

A test shows each fault without its patch.
"""

from __future__ import annotations

from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform


def before_update(model: nn.Module) -> None:
    """Apply the patches that belong before a load."""
    _forget_broken_load(model)
    _pack_experts_again(model)


def _forget_broken_load(model: nn.Module) -> None:
    """Make vLLM forget the tensors of a load that did not end (vLLM 0.32).

    vLLM counts the numbers that a layer has got, and goes on counting at the next load: a layer of several tensors
    would be taken for complete before its last one, with an older one in its place, and no error is raised.
    """
    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load():
            info.loaded_weights.clear()
            info.load_numel = 0


def _pack_experts_again(model: nn.Module) -> None:
    """Make vLLM pack the experts again at the next load (vLLM 0.32, CPU).

    vLLM packs experts for its kernel only at the first load. Every later load writes unpacked weights where packed ones
    are read: log-probs are off by nats, and no error is raised. Without a kernel, vLLM treats a load as the first.
    """
    if not current_platform.is_cpu():
        return
    for layer in model.modules():
        if isinstance(layer, RoutedExperts):
            layer.quant_method.moe_kernel = None


def after_update(model: nn.Module) -> None:
    """Renew the packed copy of a tied head (vLLM 0.32, CPU).

    A head that is tied to the embedding has a packed copy of it. A load does not renew that copy, because no tensor of
    the checkpoint is the head's: log-probs are off by nats, and no error is raised.
    """
    if not current_platform.is_cpu():
        return
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)

"""What is put right in vLLM around a weight update: each by version and platform, with the reason, and no more.

The tests show each fault without its mending.
"""

from __future__ import annotations

from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform


def before_update(model: nn.Module) -> None:
    """vLLM 0.32, CPU: experts are packed for its kernel on the first load alone, and every later load writes unpacked
    weights where packed ones are read (log-probs off by nats, and no error). Without a kernel, a load is a first one.
    """
    if not current_platform.is_cpu():
        return
    for layer in model.modules():
        if isinstance(layer, RoutedExperts):
            layer.quant_method.moe_kernel = None


def after_update(model: nn.Module) -> None:
    """vLLM 0.32, CPU: a head that is tied to the embedding has a packed copy of it, which a load does not renew, since
    no tensor of the checkpoint is the head's (log-probs off by nats, and no error).
    """
    if not current_platform.is_cpu():
        return
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)

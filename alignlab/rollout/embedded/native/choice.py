"""The step that an engine computes by: the native one where it can, or the Python one, with the reason in the log."""

from __future__ import annotations

import logging
from functools import cache

from torch import nn

from alignlab.config.kv_cache import MmapCache
from alignlab.config.rollout import RolloutSettings
from alignlab.errors import ConfigError
from alignlab.models.decoder import causal_lm
from alignlab.models.exact_weights import model_dtype
from alignlab.native.build import BuildError
from alignlab.rollout.embedded.mapped_file import check_mapped_cache
from alignlab.rollout.embedded.native.binding import Kernels, kernels_of
from alignlab.rollout.embedded.native.coverage import why_not_native, why_not_rounded
from alignlab.rollout.embedded.native.runner import NativeRunner
from alignlab.rollout.embedded.native.weights import NativeWeights
from alignlab.rollout.embedded.rounding import Rounding, check_torch_rounds, make_rounding
from alignlab.rollout.embedded.runner import Runner
from alignlab.rollout.embedded.weights import EngineWeights
from alignlab.rollout.memory import engine_device, merges_adapters

logger = logging.getLogger(__name__)


def make_runner(model: nn.Module, settings: RolloutSettings, block_size: int) -> tuple[EngineWeights, Runner]:
    """Return the weights and the runner of an engine.

    Args:
        model: the policy.
        block_size: tokens in a block of the cache.

    Raises:
        ConfigError: the settings require the native step, and it cannot be; an adapter cannot be merged; weights cannot
            be rounded as the settings ask; or the cache cannot lie in the file that they ask for.
    """
    device = engine_device(model)
    if isinstance(settings.kv_cache, MmapCache):
        check_mapped_cache(settings.kv_cache, device)
    rounding = make_rounding(model, settings, device)
    kernels, reason = _kernels(model, settings, block_size, rounding)
    if kernels is not None:
        native = NativeWeights(model, kernels, merge=settings.merge_lora, rounding=rounding)
        return native, NativeRunner(model, native, kernels, block_size, max_running=settings.max_running)
    if rounding is not None:
        check_torch_rounds(rounding, reason)
    weights = EngineWeights(model, merge=settings.merge_lora, pack=settings.pack_weights, rounding=rounding)
    runner = Runner(
        model, weights, block_size, max_running=settings.max_running, replay=settings.cuda_graphs,
        cache=settings.kv_cache,
    )
    return weights, runner


def _kernels(
    model: nn.Module, settings: RolloutSettings, block_size: int, rounding: Rounding | None
) -> tuple[Kernels | None, str]:
    """Return the kernels of the native step; None where the Python step computes, and the reason."""
    lm = causal_lm(model)
    device = engine_device(model)
    merges = merges_adapters(model, settings.merge_lora, device)
    reason = why_not_native(model, settings, device, block_size=block_size, merges=merges)
    if reason is None and rounding is not None:
        reason = why_not_rounded(lm, rounding)
    if reason is None:
        try:
            return kernels_of(model_dtype(lm)), ""
        except BuildError as error:
            reason = str(error)
    if settings.native == "required":
        raise ConfigError(
            f"rollout.native is required, and the native step must be possible, but {reason}; change that, or use "
            "native: auto"
        )
    if settings.native == "auto" and lm.device.type == "cpu":  # on a GPU nobody expects it
        _log_once(reason)
    return None, reason


@cache
def _log_once(reason: str) -> None:
    logger.info("the embedded engine decodes by its Python step, not the native one: %s", reason)

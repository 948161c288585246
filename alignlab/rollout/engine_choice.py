"""The engine that `rollout.engine: auto` takes: vLLM in this process where that is possible, else the embedded one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import nn
from transformers import PreTrainedModel

from alignlab.config.rollout import AutoEngineSettings, EngineSettings, RolloutSettings, VLLMSettings
from alignlab.errors import ConfigError
from alignlab.models.config import PolicyConfig
from alignlab.models.decoder import causal_lm
from alignlab.models.hub.families import write_hub_config
from alignlab.models.layout import ATTENTION
from alignlab.models.served_attention import FAMILY_KINDS, check_served
from alignlab.rollout.vllm.installation import require_vllm

logger = logging.getLogger(__name__)


def chosen_engine(settings: EngineSettings, model: nn.Module, device: torch.device) -> EngineSettings:
    """Return the settings of an engine; for `auto` those of the engine that fits, which the log names.

    Args:
        settings: of a run.
        model: the policy, with or without weights.
        device: of the policy.
    """
    if not isinstance(settings, AutoEngineSettings):
        return settings
    obstacle = _obstacle(model, device)
    shared = settings.model_dump(exclude={"engine"}, exclude_unset=True)
    chosen: EngineSettings = VLLMSettings(**shared) if obstacle is None else RolloutSettings(**shared)
    # A warning, which the command line shows: the user did not name the engine.
    reason = obstacle or "the policy is on a GPU, and vLLM is installed and runs it"
    logger.warning("rollout.engine auto takes %s: %s", chosen.engine, reason)
    return chosen


def _obstacle(model: nn.Module, device: torch.device) -> str | None:
    """Return why vLLM cannot run in this process on a GPU, completing "takes embedded: ..."; None if it can."""
    num_ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if device.type != "cuda":
        return "the policy is not on a GPU"
    if num_ranks > 1:
        return (
            f"the training has {num_ranks} ranks, and would start a vLLM in each; rollout.engine: vllm asks for that"
        )
    if find_spec("vllm") is None:
        return "vLLM is not installed"
    return _obstacle_of_model(causal_lm(model)) or _refusal(lambda: require_vllm("vllm"))


def _obstacle_of_model(lm: PreTrainedModel) -> str | None:
    """Return why vLLM cannot run a model on a GPU, or was not seen to; None if it can."""
    if isinstance(lm.config, PolicyConfig):
        config = lm.config
        if write_hub_config(config) is None:
            return "no Hub family has this architecture; rollout.engine: vllm runs it through a plug-in"
        if set(config.layer_types or ()).intersection(FAMILY_KINDS):
            return "vLLM's latent, gated and recurrent layers were not tried on a GPU; rollout.engine: vllm takes them"
        return _refusal(lambda: check_served(config))
    if lm.config._attn_implementation == ATTENTION:
        return f"whether vLLM knows {type(lm).__name__} is not known before it starts; rollout.engine: vllm tries it"
    return None


def _refusal(check: Callable[[], None]) -> str | None:
    """Return the message of the ConfigError that a check raises; None if it raises none."""
    try:
        check()
    except ConfigError as error:
        return str(error)
    return None

"""The uses that a router cannot have, refused by name before work is lost."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Cache

from alignlab.errors import ConfigError
from alignlab.models.config import PolicyConfig
from alignlab.models.decoder import causal_lm
from alignlab.models.routers.topk import TopKRouter

_CAUSAL = "use router_type: topk, or train by SFT or distillation alone"


def _router_config(model: nn.Module) -> PolicyConfig | None:
    """Return the config of an in-house mixture; None for other models."""
    config = causal_lm(model).config
    return config if isinstance(config, PolicyConfig) and config.sparse_layers else None


def check_rollouts(model: nn.Module) -> None:
    """Raise unless an engine can generate from a model.

    Raises:
        ConfigError: the router is not causal.
    """
    config = _router_config(model)
    if config is not None and config.router_type == "expert_choice":
        raise ConfigError(
            "router_type is expert_choice, in which later tokens decide the experts of earlier ones, so nothing can be "
            f"generated token by token; {_CAUSAL}"
        )


def check_cached_pass(config: PolicyConfig, cache: Cache | None) -> None:
    """Raise if a pass over a cache of earlier tokens would choose other experts than a pass over all of them.

    Raises:
        ConfigError: the router is not causal.
    """
    if config.router_type == "expert_choice" and cache is not None and cache.get_seq_length() > 0:
        raise ConfigError(
            "router_type is expert_choice, in which later tokens decide the experts of earlier ones, so a cache cannot "
            f"stand for earlier tokens; call the model with use_cache=False, or {_CAUSAL}"
        )


def check_vllm(model: nn.Module) -> None:
    """Raise unless vLLM can route as a model does. vLLM calls our routers, but hands them hidden states alone.

    Raises:
        ConfigError: the router needs token ids, drops choices or is not causal.
    """
    config = _router_config(model)
    if config is None:
        return
    check_rollouts(model)
    if config.router_type == "hash":
        raise ConfigError(
            "router_type is hash, which routes by token id, and vLLM hands experts no ids; use rollout.engine: embedded"
        )
    if config.capacity_factor is not None:
        raise ConfigError(
            f"capacity_factor is {config.capacity_factor}, and vLLM drops no choices, and records none as dropped; use "
            "rollout.engine: embedded, or leave capacity_factor out"
        )


def compare_logprobs(model: nn.Module, trainer: str, *, replays: bool, per_token: bool) -> None:
    """Prepare a model's routers for a trainer that compares log-probs of several passes: each must choose alike.

    Noise, draws and balanced assignments of training passes are switched off, and experts are chosen as in rollouts.

    Args:
        trainer: name of the trainer, for messages.
        replays: whether updates replay recorded choices.
        per_token: whether each token has a loss of its own.

    Raises:
        ConfigError: the router cannot choose alike, or cannot learn from such losses.
    """
    config = _router_config(model)
    if config is None:
        return
    if config.router_type == "expert_choice":
        raise ConfigError(
            f"router_type is expert_choice, and {trainer} compares log-probs, which must not depend on later tokens; "
            f"{_CAUSAL}"
        )
    if config.capacity_factor is not None and not replays:
        raise ConfigError(
            f"capacity_factor is {config.capacity_factor}, and {trainer} compares log-probs of passes that would drop "
            "other choices; leave it out, or use a trainer that replays the engine's choices (routing_replay: rollout)"
        )
    if config.router_type == "reinforce" and not per_token:
        raise ConfigError(
            f"router_type is reinforce, which learns from the loss of each token, and {trainer} has none; use "
            "router_type: topk"
        )
    _set_exploring(model, False)


def let_explore(model: nn.Module) -> None:
    """Let a model's routers choose in training passes as their methods say: with noise, by drawing, or balanced."""
    _set_exploring(model, True)


def _set_exploring(model: nn.Module, explores: bool) -> None:
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.explores = explores


def check_policy_losses(model: Any, trainer: str) -> None:
    """Raise if a router is to learn by REINFORCE from a trainer whose outputs do not say what it chose.

    Raises:
        ConfigError: with the trainer.
    """
    config = _router_config(model)
    if config is not None and config.router_type == "reinforce":
        raise ConfigError(
            f"router_type is reinforce, and {trainer} does not train routers so; use router_type: topk"
        )

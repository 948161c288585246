"""Rules for the model that the stages start from, which may be the judge, too."""

from __future__ import annotations

from typing import Any

from alignlab.config.rollout import max_staleness
from alignlab.config.trainers import OnlineConfig, RLAIFConfig
from alignlab.errors import ConfigError
from alignlab.models.adapters import has_adapters
from alignlab.scoring.judges.make_judge import shares_base


def check_base(config: RLAIFConfig, model: Any, *, trains_adapter: bool) -> None:
    """Raise if the stages cannot start from a model, or the judge shares a base whose weights would be trained.

    Args:
        config: the trainer's section.
        model: the model.
        trains_adapter: whether each stage trains an adapter rather than all weights.

    Raises:
        ConfigError: the message says what to change.
    """
    if has_adapters(model):
        raise ConfigError(
            "the model has an adapter already, and every stage of RLAIF trains one of its own; merge it first "
            "(alignlab merge)"
        )
    if not shares_base(config.judge):
        return
    if not trains_adapter:
        raise ConfigError(
            "judge.name is not given, so that the policy's own base judges, and all weights would be trained, the "
            "judge's with them; give judge.name, or train an adapter (model.lora)"
        )
    policy = config.policy
    if isinstance(policy, OnlineConfig) and max_staleness(policy.rollout):
        raise ConfigError(
            f"policy.rollout.max_staleness is {max_staleness(policy.rollout)}, and must be 0 where the policy's "
            "own base judges: it would judge while it is trained on; give judge.name, or use max_staleness 0"
        )

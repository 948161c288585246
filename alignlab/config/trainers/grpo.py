"""What GRPO and its family are told."""

from __future__ import annotations

import logging
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from alignlab.config.online_rules import GRPO_DOUBTS, GRPO_RULES
from alignlab.config.recipes import fill_recipe
from alignlab.config.rollout import SamplingSettings
from alignlab.config.trainers.online import PolicyGradientConfig

_log = logging.getLogger(__name__)

Recipe = Literal["grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gspo", "cispo"]
Advantage = Literal[
    "group_normalized", "group_centered", "leave_one_out", "batch_whitened", "token_whitened", "group_centered_whitened"
]
Surrogate = Literal["ppo_clip", "gspo_clip", "cispo", "reinforce"]
Reduction = Literal["token_mean", "sequence_mean", "constant"]


class GRPOConfig(PolicyGradientConfig):
    """Critic-free reinforcement learning with a group baseline (GRPO, arXiv:2402.03300, and its family)."""

    type: Literal["grpo"] = "grpo"
    recipe: Recipe = "grpo"
    """Sets the fields from `advantage` to `overlong_buffer_tokens` that are not given; see `recipes`."""
    group_size: int = Field(8, ge=2)
    """Completions a prompt."""
    advantage: Advantage = "group_normalized"
    """What a completion is credited with, see `functional.advantages`. Relative to its group: divided by the group's
    deviation or not, or to the others of the group (leave_one_out). Relative to the whole step: over completions
    (batch_whitened) or over tokens (token_whitened; group_centered_whitened after taking the group's mean off)."""
    surrogate: Surrogate = "ppo_clip"
    reduction: Reduction = "sequence_mean"
    dynamic_sampling: bool = False
    """Drop groups whose rewards are all equal, and sample others in their place (DAPO)."""
    max_refills: int = Field(3, ge=1)
    """Further rounds of sampling a step under `dynamic_sampling`."""
    overlong_buffer_tokens: int | None = Field(None, ge=1)
    """Length, below the limit, over which a completion is penalised (DAPO, Eq. 13)."""
    overlong_penalty: float = Field(1.0, gt=0)
    """The penalty at the limit."""

    @model_validator(mode="before")
    @classmethod
    def _fill_recipe(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        sampling = given.get("sampling", SamplingSettings())
        sampling = dict(sampling) if isinstance(sampling, dict | SamplingSettings) else {}
        limit = sampling.get("max_new_tokens")
        default = SamplingSettings.model_fields["max_new_tokens"].default
        return fill_recipe(given, limit if isinstance(limit, int) else default)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for rule in GRPO_RULES:
            rule(self)
        for text in self.doubts:
            _log.warning("%s", text)
        return self

    @property
    def doubts(self) -> tuple[str, ...]:
        """A sentence for each combination of settings that runs and is hardly meant, with what to use instead."""
        return tuple(text for doubt in GRPO_DOUBTS if (text := doubt(self)) is not None)

    @property
    def method(self) -> str:
        """What is done, in a few words."""
        return f"{self.recipe} = {self.advantage} + {self.surrogate} + {self.reduction}"

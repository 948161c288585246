"""A whole run: what a YAML file says."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from alignlab.config.base import Frozen
from alignlab.config.data import DataSettings
from alignlab.config.model import ModelSettings
from alignlab.config.rewards import RewardSettings
from alignlab.config.rollout import SamplingSettings
from alignlab.config.trainers import GRPOConfig, SFTConfig


class EvaluationSettings(Frozen):
    """How held-out accuracy is measured: greedy, and sampled at temperature 1 unless `sampled` says otherwise."""

    num_problems: int | None = Field(None, ge=1)
    """Default: all of the evaluation data."""
    num_samples: int = Field(4, ge=1)
    """Sampled completions a problem."""
    pass_at: tuple[int, ...] = (1,)
    """The k of pass@k, each at most num_samples."""
    sampled: SamplingSettings | None = None
    """Default: the trainer's sampling at temperature 1."""
    scorer: str | None = None
    """The reward function whose value 1 means a right answer; default: the first of `rewards`."""


class WarmStart(Frozen):
    """Supervised fine-tuning before reinforcement learning, on the training data's prompts and answers."""

    trainer: SFTConfig = SFTConfig()
    data: DataSettings | None = None
    """Default: the run's training data."""
    answer_column: str = "answer"
    answer_template: str = "{answer}"


class RunConfig(Frozen):
    """A run from one file."""

    model: ModelSettings
    data: DataSettings
    eval_data: DataSettings | None = None
    """Default for a task: the same task, split "eval"."""
    rewards: tuple[RewardSettings, ...] = ()
    trainer: Annotated[GRPOConfig | SFTConfig, Field(discriminator="type")]
    evaluation: EvaluationSettings = EvaluationSettings()
    warm_start: WarmStart | None = None

"""The average of the weights in training, in whose place evaluations and a run's model may be."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from alignlab.config.base import Frozen, OnResume, Recorded
from alignlab.config.error_messages import BrokenRule
from alignlab.config.trainer import ShardingSettings, TrainerConfig


class EMASettings(Frozen):
    """An exponential moving average of the weights, in float32, beside those in training."""

    on_resume = OnResume.RECORDED
    decay: float = Field(0.999, gt=0, lt=1)
    """Weight of the average so far at each optimizer update; it reaches back about 1 / (1 - decay) updates."""
    evaluate: bool = True
    """Evaluations between steps are of the average; otherwise of the weights in training."""
    export: bool = True
    """The run's model is the average, and so are models beside checkpoints; otherwise they are of the weights in
    training. The evaluation after training is of the run's model."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.evaluate or self.export):
            raise BrokenRule("export", False, "be true where evaluate is false: nothing would read the average",
                             "leave ema out")
        return self

    def check_sharding(self, sharding: ShardingSettings, name: str) -> None:
        """Raise if DeepSpeed trains, whose optimizer steps on flat parts of the weights, which are written back later.

        Args:
            name: of the section of this average.

        Raises:
            BrokenRule: with the strategies that there are.
        """
        if sharding.zero_stage:
            must = f"be null with sharding.strategy {sharding.strategy}: DeepSpeed's flat weights are not averaged"
            raise BrokenRule(name, "given", must, "use strategy: fsdp2 or ddp, or leave ema out")


class AveragedConfig(TrainerConfig):
    """Settings of trainers whose evaluations and model may be an average of the weights."""

    ema: Recorded[EMASettings | None] = None
    """None keeps no average."""

    @model_validator(mode="after")
    def _check_average(self) -> Self:
        if self.ema is None:
            return self
        self.ema.check_sharding(self.sharding, "ema")
        if self.early_stopping is not None and self.ema.evaluate != self.ema.export:
            must = f"be {str(self.ema.export).lower()} with early_stopping, which chooses the model that it evaluates"
            raise BrokenRule("ema.evaluate", self.ema.evaluate, must, f"use {str(self.ema.export).lower()}")
        return self

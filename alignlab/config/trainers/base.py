"""What every trainer is told."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from alignlab.config.base import Frozen
from alignlab.config.messages import BrokenRule
from alignlab.config.on_resume import MayChange, OnResume, Recorded


class TrainerConfig(Frozen):
    """What every trainer has."""

    on_resume = OnResume.REFUSED
    takes_rewards: ClassVar[Literal["needed", "optional", "none"]] = "none"
    """Whether a run of it names reward functions: to learn from, or as the scorer of its evaluation alone."""
    measures: ClassVar[Literal["accuracy", "preferences", "labels", "likelihood"]]
    """On held-out data: the rate of right answers, of chosen completions that lead, of labels agreed with; or how
    likely completions are."""

    output_dir: MayChange[Path] = Path("runs/alignlab")
    seed: int = Field(0, ge=0, lt=2**32)
    num_steps: Recorded[int] = Field(100, ge=1)
    """Batches of rollouts or of examples."""
    learning_rate: Recorded[float] = Field(1e-5, gt=0)
    lr_schedule: Recorded[Literal["constant", "linear", "cosine"]] = "constant"
    """After the warm-up: constant, or decaying to 0 at the last step."""
    warmup_steps: Recorded[int] = Field(0, ge=0)
    """Steps, of however many updates each."""
    weight_decay: Recorded[float] = Field(0.0, ge=0)
    adam_beta1: Recorded[float] = Field(0.9, ge=0, lt=1)
    adam_beta2: Recorded[float] = Field(0.999, ge=0, lt=1)
    max_grad_norm: Recorded[float] = Field(1.0, gt=0)
    tokens_per_microbatch: MayChange[int] = Field(4096, ge=1)
    """Tokens in one forward and backward pass; changes memory and speed, never the gradient."""
    logprob_chunk_tokens: MayChange[int] = Field(512, ge=1)
    """Tokens whose logits exist at one time."""
    gradient_checkpointing: MayChange[bool] = False
    on_nonfinite: Recorded[Literal["stop", "skip"]] = "stop"
    """A loss or gradient that is not finite: stop, or skip the update and count it."""
    save_every_steps: MayChange[int | None] = Field(None, ge=1)
    """None saves at the end and on interruption only."""
    keep_checkpoints: MayChange[int] = Field(2, ge=1)
    rank_timeout_s: MayChange[float] = Field(1800.0, gt=0)
    """On several ranks: how long the others wait for one that is alive and does not get on. One that fails, is killed
    or is stopped is noticed within seconds, or 30 s, whatever this says."""
    trackers: MayChange[tuple[str, ...]] = ("tensorboard",)
    """Names of accelerate's trackers, beside metrics.jsonl, which is always written."""

    @property
    def method(self) -> str:
        """What is done, in a few words."""
        raise NotImplementedError

    @property
    def step(self) -> str:
        """What a step is made of."""
        raise NotImplementedError

    @field_validator("output_dir")
    @classmethod
    def _at_home(cls, path: Path) -> Path:
        return path.expanduser()

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if self.warmup_steps >= self.num_steps:
            must = f"be less than num_steps ({self.num_steps})"
            raise BrokenRule("warmup_steps", self.warmup_steps, must, f"use {self.num_steps // 10}")
        return self


class EvaluatedConfig(TrainerConfig):
    """What every trainer has that looks at held-out data."""

    eval_every_steps: MayChange[int | None] = Field(None, ge=1)
    """Evaluate during training too; before and after is always done where there is evaluation data."""

"""Settings that every trainer has."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from alignlab.config.base import Frozen, MayChange, OnResume, Recorded, Refused
from alignlab.config.error_messages import BrokenRule
from alignlab.files.home_folder import with_home

WeightKind = Literal["matrices", "embeddings", "norms", "biases", "vectors"]
"""Kind of a weight, see `loop.weight_decay`."""


class OptimSettings(Frozen):
    """AdamW, its learning rate over the run, and the bounds of an update."""

    on_resume = OnResume.RECORDED
    learning_rate: float = Field(1e-5, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or decaying to 0 at the last step."""
    warmup_steps: int = Field(0, ge=0)
    """Steps (not updates) in which the learning rate rises to its full value."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled from the gradient (AdamW): at each update a weight loses this fraction, times the learning rate."""
    weight_decay_on: tuple[WeightKind, ...] = ("matrices", "embeddings")
    """Kinds of weights that decay: matrices (adapters too), embeddings (with a tied head), norms, biases, other
    vectors. `alignlab check` shows how many weights are of which kind."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    keep_zeros: Refused[bool] = False
    """Weights of matrices that are zero at first stay zero, as those that `alignlab prune` made so."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop, or skip the update and count it."""

    @model_validator(mode="after")
    def _check_weight_decay(self) -> Self:
        kinds = self.weight_decay_on
        if self.weight_decay == 0:
            self.refuse_unread("weight_decay_on", "with weight_decay 0", "remove it, or use weight_decay 0.1")
        if not kinds or len(set(kinds)) < len(kinds):
            must = "name at least one kind, each once"
            fix = "use weight_decay 0, or [matrices]" if not kinds else f"use {list(dict.fromkeys(kinds))}"
            raise BrokenRule("weight_decay_on", list(kinds), must, fix)
        return self


class MemorySettings(Frozen):
    """Sizes of the pieces in which a step is computed. They change memory and speed, never the gradient."""

    on_resume = OnResume.MAY_CHANGE
    tokens_per_microbatch: int = Field(4096, ge=1)
    """Tokens in one forward and backward pass."""
    logprob_chunk_tokens: int | None = Field(None, ge=1)
    """Tokens whose logits exist at one time; default: 512, and 2,048 for log-probs on a GPU."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass, instead of storing them."""
    reference_on_host: bool = False
    """Where all weights train on a GPU: the reference, a copy of the first weights, lies in the host's memory, and is
    copied to the GPU whenever it scores a mini-batch. An adapter's reference is its base, and takes no memory."""


class NumericsSettings(Frozen):
    """Precision and order of what a GPU computes, in training and in rollouts alike; and kernels of a CPU."""

    on_resume = OnResume.RECORDED
    tf32: bool = False
    """float32 products of numbers rounded to TF32, of 10 bits behind the point: several times as fast, and the rounding
    errors, with the gap between engine and trainer, near float16's. Of use where model.dtype is float32."""
    deterministic: bool = False
    """The same run, on the same card and number of ranks with the same versions, gives the same bits, and so does a
    resumed run; otherwise sums are added in any order, and a resumed run is close. Rollouts of vLLM depend on its
    batches in both cases. Costs speed: slower sums and products, compiled kernels that are not tuned, and memory that
    is filled before it is written. On a CPU this and tf32 change nothing."""
    native_attention: Literal["auto", "off", "required"] = "auto"
    """Packed attention in bfloat16 on a CPU, by kernels that a C++ compiler makes of the package's sources: auto takes
    them where the processor has the instructions and the machine a compiler; required stops where it has not."""


class CheckpointSettings(Frozen):
    """Intervals of checkpoints, and the number that stays on disk."""

    on_resume = OnResume.MAY_CHANGE
    every_steps: int | None = Field(None, ge=1)
    """None saves at the end and on interruption only."""
    keep: int = Field(2, ge=1)
    """Number of the newest checkpoints that stay."""
    with_model: bool = False
    """Beside each checkpoint write its model, or adapter, for other programs: `models/step-N` in the run's folder."""


class ShardingSettings(Frozen):
    """Where the weights in training live when a run has several ranks."""

    on_resume = OnResume.RECORDED
    strategy: Literal["none", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "ddp"
    """none: one process. ddp: each rank holds all weights, gradients and optimizer states. fsdp2: each rank holds some
    rows of each tensor, and gathers a layer's weights while it computes with them. zero1, zero2, zero3: DeepSpeed's
    ZeRO, whose ranks share out the optimizer's states; gradients too; weights too."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What lies in the host's memory and not on the GPU: nothing; the optimizer's states (zero1, zero2, zero3); or
    weights too (zero3)."""
    deepspeed: Path | None = None
    """A JSON file of DeepSpeed's settings, for zero1, zero2 and zero3: buckets, overlap and what else the trainer's
    config does not decide."""

    @property
    def zero_stage(self) -> int:
        """Return the stage of ZeRO by DeepSpeed; 0 for another strategy."""
        return int(self.strategy.removeprefix("zero")) if self.strategy.startswith("zero") else 0

    @property
    def spreads_training(self) -> bool:
        """Return whether a rank holds a part of the weights, or of the optimizer's states, alone."""
        return self.strategy == "fsdp2" or self.zero_stage > 0

    @property
    def spreads_weights(self) -> bool:
        """Return whether a rank holds a part of the weights alone."""
        return self.strategy in ("fsdp2", "zero3")

    @property
    def spreads_gradients(self) -> bool:
        """Return whether a rank holds a part of the gradients alone."""
        return self.strategy in ("fsdp2", "zero2", "zero3")

    @field_validator("deepspeed")
    @classmethod
    def _expand_home(cls, path: Path | None) -> Path | None:
        return None if path is None else with_home(path)

    @model_validator(mode="after")
    def _check_offload(self) -> Self:
        strategies = {"none": None, "optimizer": ("zero1", "zero2", "zero3"), "all": ("zero3",)}[self.offload]
        if strategies is not None and self.strategy not in strategies:
            must = f"be none with strategy {self.strategy}"
            raise BrokenRule("offload", self.offload, must, f"use strategy: {' or '.join(strategies)}")
        if self.deepspeed is not None and self.zero_stage == 0:
            must = f"be null with strategy {self.strategy}, which DeepSpeed has no part in"
            raise BrokenRule("deepspeed", str(self.deepspeed), must, "remove it, or use zero1, zero2 or zero3")
        return self


EVALUATED = {
    "likelihood": ("loss",),
    "preferences": ("loss", "accuracy"),
    "labels": ("loss", "accuracy"),
    "accuracy": ("greedy", "sampled"),
}
"""By what a trainer measures on held-out data: the metrics that early stopping may go by."""


class EarlyStoppingSettings(Frozen):
    """The end of a run whose held-out metric no longer improves, and the choice of its model.

    Evaluations are those of `eval_every_steps`, and one after the last step; that before the first counts as none. The
    checkpoint of the best one is kept.
    """

    on_resume = OnResume.RECORDED
    metric: Refused[Literal["loss", "accuracy", "greedy", "sampled"]]
    """loss falls, the others rise. sft: loss; dpo, kto and reward: loss or accuracy; trainers that are measured by
    answers: greedy or sampled accuracy."""
    patience: int = Field(3, ge=1)
    """Evaluations in a row without an improvement after which the run ends."""
    min_delta: float = Field(0.0, ge=0)
    """A metric improves if it is better than the best by more than this."""
    export: Literal["best", "last"] = "best"
    """The run's model, `model` or `adapter` in its folder: of the best evaluation, or of the last step."""


class TrainerConfig(Frozen):
    """Settings that every trainer has."""

    on_resume = OnResume.REFUSED
    takes_rewards: ClassVar[Literal["needed", "optional", "none"]] = "none"
    """needed: reward functions are learnt from. optional: the first one may score the evaluation."""
    measures: ClassVar[Literal["accuracy", "preferences", "labels", "likelihood"]]
    """Metric of held-out data: accuracy of answers, how often the chosen completion leads, agreement with labels, or
    likelihood of completions."""
    evaluates_between: ClassVar[bool] = True
    """Whether held-out data is measured between steps too, and not before and after training alone."""

    output_dir: MayChange[Path] = Path("runs/alignlab")
    seed: int = Field(0, ge=0, lt=2**32)
    num_steps: Recorded[int] = Field(100, ge=1)
    """Batches of rollouts or of examples."""
    eval_every_steps: MayChange[int | None] = Field(None, ge=1)
    """Evaluate during training too; before and after is always done where there is evaluation data."""
    early_stopping: Recorded[EarlyStoppingSettings | None] = None
    """None trains to the last step. Needs `eval_every_steps` and held-out data."""
    optim: OptimSettings = OptimSettings()
    memory: MemorySettings = MemorySettings()
    numerics: NumericsSettings = NumericsSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    sharding: ShardingSettings = ShardingSettings()
    rank_timeout_s: MayChange[float] = Field(1800.0, gt=0)
    """On several ranks: how long the others wait for a rank that is alive and makes no progress. A rank that fails, is
    killed or is stopped is noticed within 30 s in any case."""
    trackers: MayChange[tuple[str, ...]] = ("tensorboard",)
    """Names of accelerate's trackers, beside metrics.jsonl, which is always written."""

    @property
    def method(self) -> str:
        """Short description of the method, for reports."""
        raise NotImplementedError

    @property
    def step(self) -> str:
        """Short description of a step's size, for reports."""
        raise NotImplementedError

    @field_validator("output_dir")
    @classmethod
    def _expand_home(cls, path: Path) -> Path:
        return with_home(path)

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        warmup = self.optim.warmup_steps
        if warmup >= self.num_steps:
            must = f"be less than num_steps ({self.num_steps})"
            raise BrokenRule("optim.warmup_steps", warmup, must, f"use {self.num_steps // 10}")
        return self

    @model_validator(mode="after")
    def _check_keep_zeros(self) -> Self:
        if self.optim.keep_zeros and self.sharding.spreads_training:
            must = f"be false with sharding.strategy {self.sharding.strategy}: zeros are kept where weights are whole"
            raise BrokenRule("optim.keep_zeros", True, must, "use strategy: ddp")
        return self

    @model_validator(mode="after")
    def _check_early_stopping(self) -> Self:
        if self.early_stopping is None:
            return self
        if not self.evaluates_between:
            must = "be null for a trainer that measures before and after training only"
            raise BrokenRule("early_stopping", "given", must, "remove it")
        metric, known = self.early_stopping.metric, EVALUATED[self.measures]
        if metric not in known:
            must = f"be {' or '.join(known)} for a trainer whose held-out data measures {self.measures}"
            raise BrokenRule("early_stopping.metric", metric, must, f"use {known[0]}")
        if self.eval_every_steps is None:
            must = "be given with early_stopping, which goes by the evaluations between steps"
            raise BrokenRule("eval_every_steps", None, must, f"use {max(1, self.num_steps // 10)}")
        return self

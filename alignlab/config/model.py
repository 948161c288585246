"""The model, its tokenizer and its adapter."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from alignlab.config.base import Frozen, OnResume, Recorded, at_home
from alignlab.config.error_messages import BrokenRule

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class LoraSettings(Frozen):
    """A LoRA adapter (arXiv:2106.09685), made by PEFT."""

    on_resume = OnResume.REFUSED
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = "all-linear"
    experts: bool = False
    """Adapt the experts of a mixture too, each with matrices of its own (PEFT's target_parameters)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.experts and self.dropout:
            must = "be 0 with experts, whose low-rank products are not made from one input"
            raise BrokenRule("dropout", self.dropout, must, "use 0, or remove experts")
        if not self.target_modules and not self.experts:
            must = "name at least one layer where experts are not adapted"
            raise BrokenRule("target_modules", self.target_modules, must, "use all-linear")
        return self


class TokenizerTraining(Frozen):
    """A byte-pair tokenizer trained from the text of the training task."""

    on_resume = OnResume.REFUSED
    vocab_size: int = Field(512, ge=258)
    num_texts: int = Field(2000, ge=1)
    """Prompts and answers that are read."""


class StudentSettings(Frozen):
    """Layers of a teacher that a student begins with: exactly one of `layers` and `num_layers`."""

    on_resume = OnResume.REFUSED
    layers: tuple[int, ...] | None = None
    """Counted from 0, ascending."""
    num_layers: int | None = Field(None, ge=1)
    """Number of layers, evenly spaced, the first and the last among them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.layers is None) == (self.num_layers is None):
            value = None if self.layers is None else list(self.layers)
            raise BrokenRule("layers", value, "be given exactly where num_layers is not", "give one of the two")
        if self.layers is not None:
            chosen = list(self.layers)
            if not chosen or min(chosen) < 0 or chosen != sorted(set(chosen)):
                valid = sorted({index for index in chosen if index >= 0}) or [0]
                raise BrokenRule("layers", chosen, "hold at least one index, none below 0, ascending", f"use {valid}")
        return self


class ModelSettings(Frozen):
    """The policy: an existing checkpoint by `name`, or a new model by `architecture`."""

    on_resume = OnResume.REFUSED
    name: Recorded[str | None] = None
    """A Hub id, a local folder, or a model that a Python package ships, such as smollm2-135m-instruct."""
    architecture: dict[str, Any] | None = None
    """Fields of `PolicyConfig` for a model trained from nothing."""
    tokenizer: Recorded[str | TokenizerTraining | None] = None
    """Default: the one beside `name`."""
    dtype: Dtype = "auto"
    """auto: bfloat16 under an adapter, float32 where all weights train. Where all train in 16 bits, the
    optimizer updates float32 copies, and rounds them into the weights; forward passes and the engine take half the
    memory. float16 rounds 8 times as finely as bfloat16, so that engine and trainer differ less; its range is smaller,
    so that the loss is scaled. A mixture of experts computes one product for each expert in float16 and float32 on a
    GPU, whose grouped kernel is for bfloat16."""
    lora: LoraSettings | None = None
    """None trains all weights."""
    student: StudentSettings | None = None
    """Begin with some layers of `name` only."""
    mtp: bool = False
    """Load the layer for multi-token prediction that the files of a DeepSeek-V3 hold, to be trained by itself beside
    the policy (SFT, GRPO, on-policy distillation) and written back. Otherwise it is left out."""

    _at_home = field_validator("name", "tokenizer")(at_home)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name is None and self.architecture is None:
            must = "be given where there is no architecture"
            raise BrokenRule("name", None, must, "use a Hub id, a folder or a packaged model, or give architecture")
        if self.name is not None and self.architecture is not None:
            raise BrokenRule("name", self.name, "not be given beside architecture", "keep one of the two")
        if self.architecture is not None:
            self._check_new_model()
        elif isinstance(self.tokenizer, TokenizerTraining):
            must = "be a name for an existing model, whose weights mean nothing under other tokens"
            raise BrokenRule("tokenizer", "a training", must, "remove it to use the model's own")
        if self.student is not None:
            self._check_student()
        if self.mtp:
            self._check_mtp()
        return self

    def _check_mtp(self) -> None:
        for name, must in (
            ("architecture", "be false for a new model, whose architecture has num_mtp_layers"),
            ("student", "be false with student, which is made of layers of the decoder"),
            ("lora", "be false with lora, whose adapter is saved for a base without that layer"),
        ):
            if getattr(self, name) is not None:
                raise BrokenRule("mtp", True, must, f"remove it, or {name}")

    def _check_student(self) -> None:
        if self.name is None:
            must = "be null for a new model (architecture), which has no layers to choose from"
            raise BrokenRule("student", "given", must, "give name, or remove it")
        if self.lora is not None:
            must = "be null with student, whose layers have no folder that an adapter could name as its base"
            fix = "remove lora, or write the student first (alignlab student) and give its folder as name"
            raise BrokenRule("lora", f"rank {self.lora.rank}", must, fix)

    def _check_new_model(self) -> None:
        if self.tokenizer is None:
            must = "be given for a new model (architecture)"
            raise BrokenRule("tokenizer", None, must, "use {vocab_size: 512} to train one, or a tokenizer's name")
        if self.lora is not None:
            must = "be null for a new model: an adapter on random weights leaves them random"
            raise BrokenRule("lora", f"rank {self.lora.rank}", must, "remove lora")

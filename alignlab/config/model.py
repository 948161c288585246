"""Which model, which tokenizer, which adapter."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from alignlab.config.base import Frozen

Dtype = Literal["auto", "float32", "bfloat16"]


class LoraSettings(Frozen):
    """A LoRA adapter (arXiv:2106.09685), made by PEFT."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = "all-linear"


class TokenizerTraining(Frozen):
    """A byte-pair tokenizer trained from the text of the training task."""

    vocab_size: int = Field(512, ge=64)
    num_texts: int = Field(2000, ge=1)
    """Prompts and answers to read."""


class ModelSettings(Frozen):
    """The policy: an existing checkpoint by `name`, or a new model by `architecture`."""

    name: str | None = None
    """A Hub id, a local folder, or a model that a Python package ships, such as smollm2-135m-instruct."""
    architecture: dict[str, Any] | None = None
    """Fields of `PolicyConfig` for a model trained from nothing."""
    tokenizer: str | TokenizerTraining | None = None
    """Default: the one beside `name`."""
    dtype: Dtype = "auto"
    """auto: bfloat16 for a checkpoint, float32 for a new model."""
    lora: LoraSettings | None = None
    """None trains all weights."""

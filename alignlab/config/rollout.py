"""How completions are sampled, and by which engine."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from alignlab.config.base import Frozen
from alignlab.config.messages import BrokenRule
from alignlab.types import SamplingParams


class SamplingSettings(Frozen):
    """Sampling of a rollout or an evaluation; the meaning of each is `SamplingParams`'s."""

    temperature: float = Field(1.0, ge=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, lt=1)
    repetition_penalty: float = Field(1.0, gt=0)
    max_new_tokens: int = Field(64, ge=1)
    min_new_tokens: int = Field(0, ge=0)
    stop: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            must = f"be at most max_new_tokens ({self.max_new_tokens})"
            raise BrokenRule("min_new_tokens", self.min_new_tokens, must, f"use {self.max_new_tokens} or less")
        return self

    def params(self, *, n: int, seed: int | None) -> SamplingParams:
        """The engine's parameters for `n` completions a prompt."""
        return SamplingParams(n=n, seed=seed, **self.model_dump())


class RolloutSettings(Frozen):
    """The embedded engine."""

    engine: Literal["embedded"] = "embedded"
    block_size: int = Field(16, ge=1)
    """Tokens in a block of the KV cache."""
    cache_tokens: int | None = Field(None, ge=1)
    """Tokens that the KV cache holds; default: what the largest batch needs, within half of the free memory."""
    max_running: int = Field(128, ge=1)
    """Sequences decoded together."""
    prefill_tokens: int = Field(2048, ge=1)
    """Prompt tokens computed in one step; longer prompts are cut into chunks."""
    merge_lora: bool = True
    """Roll out from a merged copy of the adapted weights, refreshed after each update; false applies it live."""
    pack_weights: bool = True
    """On a CPU in bfloat16: roll out from a copy of the linear layers laid out for its matrix products. Faster, the
    same results; costs the weights' size in memory. Elsewhere nothing is copied."""

"""How completions are sampled, and by which engine."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

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


class VLLMSettings(Frozen):
    """vLLM in the trainer's process, with weights of its own that are replaced after each update."""

    engine: Literal["vllm"] = "vllm"
    max_running: int = Field(128, ge=1)
    """Sequences decoded together."""
    prefill_tokens: int = Field(2048, ge=1)
    """Tokens computed in one step."""
    block_size: int | None = Field(None, ge=1)
    """Tokens in a block of the KV cache, and of the prompts that are shared; default: vLLM's own."""
    memory_frac: float = Field(0.4, gt=0, lt=1)
    """Of the device's memory (of the machine's, on a CPU): weights and KV cache of vLLM."""
    cache_gib: float | None = Field(None, gt=0)
    """Memory of the KV cache; default: what is left of `memory_frac`."""
    eager: bool | None = None
    """Without compilation and CUDA graphs; default: on a CPU, where compiling pays after about 100,000 tokens."""
    sync: Literal["auto", "merged", "adapter"] = "auto"
    """What travels at an update: all weights, an adapter merged in; or the adapter alone. auto: the adapter alone where
    there is one and a GPU; on a CPU vLLM generates half as fast with one."""
    digests_every_updates: int = Field(1, ge=1)
    """Every so many weight updates, digests of all tensors are compared on both sides."""
    canary_every_updates: int = Field(10, ge=1)
    """Every so many, and at the first two, the log-probs of a canary are compared with the trainer's."""
    canary_prompts: int = Field(4, ge=1)
    canary_prompt_tokens: int = Field(8, ge=1)
    canary_new_tokens: int = Field(2, ge=1)
    canary_gate: float | None = Field(None, gt=0)
    """Nats that any canary token may be off; default: by dtype, see `weight_proof.GATES`."""


RolloutEngineSettings = Annotated[RolloutSettings | VLLMSettings, Field(discriminator="engine")]


def fill_engine(given: Any) -> Any:
    """Settings that name no engine are the embedded one's."""
    return {"engine": "embedded"} | given if isinstance(given, dict) else given

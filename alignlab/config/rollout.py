"""How completions are sampled, and by which engine."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from alignlab.config.addresses import check_address
from alignlab.config.base import Frozen
from alignlab.config.messages import BrokenRule
from alignlab.config.on_resume import OnResume, Recorded
from alignlab.types import SamplingParams


class SamplingSettings(Frozen):
    """Sampling of a rollout or an evaluation; the meaning of each is `SamplingParams`'s."""

    on_resume = OnResume.REFUSED
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

    on_resume = OnResume.MAY_CHANGE
    engine: Recorded[Literal["embedded"]] = "embedded"
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


class _VLLMSettings(Frozen):
    """What vLLM is told, wherever it runs, and how the weights it was given are proved to be the policy's."""

    on_resume = OnResume.MAY_CHANGE
    max_running: int = Field(128, ge=1)
    """Sequences decoded together."""
    prefill_tokens: int = Field(2048, ge=1)
    """Tokens computed in one step."""
    context_tokens: int | None = Field(None, ge=2)
    """Limit of prompt and completion together, for which the KV cache must have room; default: the model's own."""
    block_size: int | None = Field(None, ge=1)
    """Tokens in a block of the KV cache, and of the prompts that are shared; default: vLLM's own."""
    memory_frac: float = Field(0.4, gt=0, lt=1)
    """Of the device's memory (of the machine's, on a CPU): weights and KV cache of vLLM."""
    cache_gib: float | None = Field(None, gt=0)
    """Memory of the KV cache; default: what is left of `memory_frac`."""
    eager: bool | None = None
    """Without compilation and CUDA graphs; default: on a CPU, where compiling pays after about 100,000 tokens."""
    sync: Recorded[Literal["auto", "merged", "adapter"]] = "auto"
    """What travels at an update: all weights, an adapter merged in; or the adapter alone. auto: the adapter alone where
    there is one and vLLM has a GPU; on a CPU it generates half as fast with one."""
    canary_every_updates: int = Field(10, ge=1)
    """Every so many, and at the first two, the log-probs of a canary are compared with the trainer's."""
    canary_prompts: int = Field(4, ge=1)
    canary_prompt_tokens: int = Field(8, ge=1)
    canary_new_tokens: int = Field(2, ge=1)
    canary_gate: float | None = Field(None, gt=0)
    """Nats that any canary token may be off; default: by dtype, see `weight_proof.GATES`."""


class VLLMSettings(_VLLMSettings):
    """vLLM in the trainer's process, with weights of its own that are replaced after each update."""

    engine: Recorded[Literal["vllm"]] = "vllm"
    digests_every_updates: int = Field(1, ge=1)
    """Every so many weight updates, digests of all tensors are compared on both sides."""
    sleep: bool | None = None
    """Give the GPU's memory to the trainer while nothing is generated: weights go to the host, the KV cache away.
    Default: on a GPU; a CPU cannot."""


class VLLMServerSettings(_VLLMSettings):
    """vLLM in processes of its own, on this or on other machines; `alignlab serve` starts them from the same file."""

    engine: Recorded[Literal["vllm_server"]] = "vllm_server"
    servers: tuple[str, ...] = Field(("http://127.0.0.1:8000",), min_length=1)
    """Addresses. Requests go to the server that has the fewest; those of a server that is lost go to the others."""
    memory_frac: float = Field(0.9, gt=0, lt=1)
    """Of the server's device: weights and KV cache."""
    max_staleness: Recorded[int] = Field(0, ge=0)
    """Steps that the policy may be ahead of the weights that sampled a token. 0: a step's rollouts are generated, then
    learnt from. k: those of up to k later steps are generated meanwhile."""
    health_every_s: float = Field(2.0, gt=0)
    """While requests run, every so many seconds each server and its engine are asked whether they live; after three
    times without an answer it is lost."""
    request_timeout_s: float = Field(600.0, gt=0)
    """A server that has not answered a request whole by then is lost; the time to send
    weights comes on top."""
    reconnect_s: float = Field(120.0, ge=0)
    """How long to wait for a server to come (back) where there is none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for address in self.servers:
            must = "hold addresses of the form http://HOST:PORT"
            check_address("servers", address, must=must, schemes=("http",), port=True, path=False)
        if len(set(self.servers)) < len(self.servers):
            raise BrokenRule("servers", list(self.servers), "name each server once", "remove the second")
        return self


EngineSettings = RolloutSettings | VLLMSettings | VLLMServerSettings
RolloutEngineSettings = Annotated[EngineSettings, Field(discriminator="engine")]


def max_staleness(settings: EngineSettings) -> int:
    """How far a policy may be ahead of the weights that its rollouts come from."""
    return settings.max_staleness if isinstance(settings, VLLMServerSettings) else 0


def fill_engine(given: Any) -> Any:
    """Settings that name no engine are the embedded one's."""
    return {"engine": "embedded"} | given if isinstance(given, dict) else given

"""Sampling of completions, and the engine that samples."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from alignlab.config.base import Frozen, OnResume, Recorded, check_address
from alignlab.config.error_messages import BrokenRule
from alignlab.config.kv_cache import ApproximateCache, ExactCache, Int4Cache, KVCacheSettings, MmapCache
from alignlab.config.weight_rounding import RoundedWeights, WeightRoundingSettings
from alignlab.types import SamplingParams

MAX_VLLM_TEMPERATURE = 2.0
CONTROLS = ("logit_bias", "banned_token_ids", "banned_words", "forced_tokens", "regex", "json_schema")
"""Sampling settings that forbid tokens of the policy, or bring in some that it would hardly write."""
ServedCache = Literal["fp8", "fp8_e5m2", "fp8_per_token_head", "int8_per_token_head", "int4_per_token_head"]
"""vLLM's names of rounded caches."""


class SamplingSettings(Frozen):
    """Sampling of a rollout or an evaluation; the fields are explained at `SamplingParams`."""

    on_resume = OnResume.REFUSED
    temperature: float = Field(1.0, ge=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, lt=1)
    typical_p: float = Field(1.0, gt=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    banned_token_ids: tuple[int, ...] = ()
    banned_words: tuple[str, ...] = ()
    forced_tokens: dict[int, int] = {}
    """Token id by its number in the completion, from 0 on."""
    regex: str | None = Field(None, min_length=1)
    json_schema: str | None = Field(None, min_length=1)
    """As JSON, or as a mapping."""
    max_new_tokens: int = Field(64, ge=1)
    min_new_tokens: int = Field(0, ge=0)
    stop: tuple[str, ...] = ()

    @field_validator("json_schema", mode="before")
    @classmethod
    def _as_json(cls, schema: Any) -> Any:
        return json.dumps(schema) if isinstance(schema, dict | bool) else schema

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            must = f"be at most max_new_tokens ({self.max_new_tokens})"
            raise BrokenRule("min_new_tokens", self.min_new_tokens, must, f"use {self.max_new_tokens} or less")
        return self

    def params(self, *, n: int, seed: int | None) -> SamplingParams:
        """Return the engine's parameters for `n` completions a prompt."""
        pairs = {name: tuple(sorted(getattr(self, name).items())) for name in ("logit_bias", "forced_tokens")}
        return SamplingParams(n=n, seed=seed, **self.model_dump() | pairs)


class _SpeculationSettings(Frozen):
    """Drafts of the next tokens, which the policy checks several at a time. Completions are the same without."""

    on_resume = OnResume.MAY_CHANGE
    num_drafts: int = Field(4, ge=1, le=64)
    """Tokens of a draft."""
    always: bool = False
    """Draft at every step. Default: where it is measured to be faster, which is tried now and then."""


class NgramSettings(_SpeculationSettings):
    """Drafts from the prompt, the completion so far and those of its group: what followed the same tokens before."""

    type: Literal["ngram"] = "ngram"
    min_match: int = Field(2, ge=1)
    """Tokens that must have stood before."""
    max_match: int = Field(4, ge=1)
    """Tokens that are looked for first; the longest match is continued."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_match > self.max_match:
            raise BrokenRule("min_match", self.min_match, f"be at most max_match ({self.max_match})", "lower it")
        return self


class DraftModelSettings(_SpeculationSettings):
    """Drafts by a smaller model of the same tokenizer."""

    type: Literal["model"] = "model"
    model: str
    """Hub id, folder or packaged model."""


class MtpSettings(_SpeculationSettings):
    """Drafts by the policy's own layer for multi-token prediction (`num_mtp_layers: 1`), which has a cache of its own;
    prompts are computed whole for it."""

    type: Literal["mtp"] = "mtp"
    num_drafts: int = Field(1, ge=1, le=64)
    """Tokens of a draft; the layer is trained for the first, and guesses more from its own states."""


SpeculationSettings = Annotated[NgramSettings | DraftModelSettings | MtpSettings, Field(discriminator="type")]


class RolloutSettings(Frozen):
    """The embedded engine."""

    on_resume = OnResume.MAY_CHANGE
    engine: Recorded[Literal["embedded"]] = "embedded"
    block_size: int | None = Field(None, ge=1)
    """Tokens in a block of the KV cache; default: 16, on a GPU 128. There it must be a power of two from 16 on."""
    cache_tokens: int | None = Field(None, ge=1)
    """Tokens that the KV cache holds; default: what the largest batch needs, within half of the free memory."""
    max_running: int = Field(128, ge=1)
    """Sequences decoded together."""
    prefill_tokens: int = Field(2048, ge=1)
    """Prompt tokens computed in one step; longer prompts are computed in chunks."""
    merge_lora: bool | None = None
    """Roll out from a merged copy of the adapted weights, refreshed after each update; false applies the adapter as it
    is, which takes no memory and two more products a layer. Default: merged, but on a GPU where the copies would take
    more than a tenth of its memory."""
    pack_weights: bool = True
    """On a CPU in bfloat16: roll out from a copy of the linear layers laid out for its matrix products. Faster, the
    same results; costs the weights' size in memory. Elsewhere nothing is copied."""
    native: Literal["auto", "off", "required"] = "auto"
    """On a CPU: compute steps by kernels in C++, which g++ compiles once into `~/.cache/alignlab`, on packed copies of
    the weights. auto: where they cover the model, its weights are bfloat16 and the processor multiplies it (AVX-512
    BF16); elsewhere the Python step computes, and the log says why. required: refuse to start without them; takes
    float32 weights too. off: never."""
    cuda_graphs: bool = True
    """On a GPU: record the decoding steps of our own models as CUDA graphs, and replay them."""
    preemption: Literal["recompute", "swap"] = "recompute"
    """What becomes of a sequence that has to give its blocks to others. recompute: its tokens are computed again.
    swap: its blocks and states are copied to the host's memory, and back when there is room again."""
    swap_gib: float = Field(4.0, gt=0)
    """Host memory for `preemption: swap`; a sequence for which it has no room is computed again."""
    speculation: SpeculationSettings | None = None
    """Guess tokens, and check several in one step; pays for few sequences at once."""
    kv_cache: KVCacheSettings = ExactCache()
    """What is kept of keys and values: all, or an approximation, such as `kv_cache: {type: int8}`."""
    quantization: Recorded[WeightRoundingSettings] = None
    """On a CPU: roll out from a rounded copy of the weights, `int8`, `int4` or `int8_dynamic`, or a section such as
    `{type: int4, group: 64, exact: [lm_head, down_proj]}`. Its probabilities are then not the policy's, which needs a
    `mismatch.correction`."""

    @model_validator(mode="after")
    def _check_rounding(self) -> Self:
        if self.quantization is not None and self.merge_lora is False:
            must = f"be true or left out with quantization {self.quantization.type}: merged weights are rounded"
            raise BrokenRule("merge_lora", False, must, "remove it, or remove quantization")
        return self

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        group = cache_group(self)
        if self.block_size is not None and self.block_size % group:
            must = f"be a multiple of kv_cache.group ({group}): a group lies in one block"
            raise BrokenRule("block_size", self.block_size, must, f"remove it, or use {group}")
        return self

    @model_validator(mode="after")
    def _check_preemption(self) -> Self:
        if self.preemption == "recompute":
            self.refuse_unread("swap_gib", "with preemption: recompute", "use preemption: swap, or remove swap_gib")
        elif isinstance(self.speculation, MtpSettings):
            must = "be recompute with speculation: mtp, which reads the states of all tokens of a sequence again"
            raise BrokenRule("preemption", self.preemption, must, "remove it, or use another speculation")
        return self


class _VLLMSettings(Frozen):
    """Settings of vLLM wherever it runs, and of the checks that its weights are the policy's."""

    on_resume = OnResume.MAY_CHANGE
    max_running: int = Field(128, ge=1)
    """Sequences decoded together."""
    prefill_tokens: int = Field(2048, ge=1)
    """Tokens computed in one step."""
    context_tokens: int | None = Field(None, ge=2)
    """Limit of prompt and completion together, for which the KV cache must have room; default: the model's own."""
    block_size: int | None = Field(None, ge=1)
    """Tokens in a block of the KV cache, and of the prompts that are shared; default: vLLM's own."""
    cache_gib: float | None = Field(None, gt=0)
    """Memory of the KV cache; default: `memory_frac` without the weights."""
    eager: bool | None = None
    """Without compilation and CUDA graphs; default: on a CPU, where compiling pays after about 100,000 tokens."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs (on a CPU: processes) over which one vLLM spreads the model; must divide its attention heads. With engine
    vllm on several ranks, each so many consecutive ranks share one vLLM; it must divide their number."""
    quantization: Recorded[Literal["fp8", "fp8_per_channel", "fp8_per_block", "int8"] | None] = None
    """Weights that vLLM rounds to 8 bits whenever they are loaded, and activations as it computes: half of bfloat16's
    memory and traffic. fp8: a scale a matrix; per_channel: an output; per_block: 128 x 128 numbers. int8: experts
    alone, with a scale an output. Its probabilities are then not the policy's, which needs a `mismatch.correction`.
    Needs an NVIDIA GPU (fp8: of compute capability 8.9 or more), and a model in bfloat16 or float16."""
    kv_cache: Recorded[ServedCache | None] = None
    """Keys and values in 8 or 4 bits: fp8 (e4m3) and fp8_e5m2 as they are, without a scale; per_token_head with one a
    token and head. On a CPU fp8 and fp8_e5m2. Needs a `mismatch.correction` too."""
    sync: Recorded[Literal["auto", "merged", "adapter"]] = "auto"
    """Weights that an update sends: all of them, an adapter merged in; or the adapter alone. auto: the adapter alone
    where there is one, vLLM has a GPU and `tensor_parallel` is 1; on a CPU vLLM generates half as fast with an
    adapter."""
    canary_every_updates: int = Field(10, ge=1)
    """Updates from one canary check to the next: log-probs of a few prompts, compared with the trainer's. The first two
    updates are always checked; on a GPU, the first ten."""
    canary_prompts: int = Field(4, ge=1)
    canary_prompt_tokens: int = Field(8, ge=1)
    canary_new_tokens: int = Field(2, ge=1)
    canary_gate: float | None = Field(None, gt=0)
    """Largest difference of a canary token's log-prob, in nats; default: by dtype, see `rollout.verification`."""


    @model_validator(mode="after")
    def _check_sync(self) -> Self:
        if self.sync == "adapter" and self.tensor_parallel > 1:
            must = f"be merged or auto with tensor_parallel {self.tensor_parallel}: workers hold parts of an adapter"
            raise BrokenRule("sync", self.sync, must, "use sync: merged, or tensor_parallel 1")
        return self


class VLLMSettings(_VLLMSettings):
    """vLLM in the trainer's process, with its own copy of the weights, which each update replaces."""

    engine: Recorded[Literal["vllm"]] = "vllm"
    memory_frac: float = Field(0.4, gt=0, lt=1)
    """Fraction of the device's memory (on a CPU: of the machine's) for vLLM's weights and KV cache."""
    digests_every_updates: int = Field(1, ge=1)
    """Weight updates from one comparison of all tensors' digests to the next. The first two updates are always checked;
    on a GPU, the first ten."""
    sleep: bool | None = None
    """Free the GPU's memory for the trainer while nothing is generated. The KV cache is dropped. Weights that the next
    update replaces are dropped too; where it brings an adapter alone, they move to the host. Default: on a GPU; a CPU
    cannot."""


class VLLMServerSettings(_VLLMSettings):
    """vLLM in separate processes, on this or on other machines; `alignlab serve` starts them from the same file."""

    engine: Recorded[Literal["vllm_server"]] = "vllm_server"
    servers: tuple[str, ...] = Field(("http://127.0.0.1:8000",), min_length=1)
    """Addresses. A request goes to the server with the fewest; those of a lost server are sent to the others."""
    memory_frac: float | None = Field(None, gt=0, lt=1)
    """Fraction of the server's device memory for weights and KV cache. Default: 0.9; where servers take all GPUs in
    view, so that a training has to share them, 0.45."""
    transfer: Literal["auto", "file", "broadcast"] = "auto"
    """Way of all weights to the servers. file: the first rank writes them into a file in memory, and uploads it to each
    server. broadcast: it sends tensor after tensor to the workers of all servers at once, by a process group (gloo
    where policy and servers are on CPUs, NCCL where each process has a GPU of its own); nobody holds a second copy, and
    a server that was lost gets the next update's weights. Not through a tunnel: servers connect to the training. auto:
    broadcast where policy and servers have GPUs of their own, else file. An adapter alone travels as a file."""
    max_staleness: Recorded[int] = Field(0, ge=0)
    """Steps that the policy may be ahead of the weights that sampled a token. 0: generation and training alternate.
    k: rollouts of up to k later steps are generated while the policy trains."""
    health_every_s: float = Field(2.0, gt=0)
    """Seconds between health checks of each server and its engine while requests run; a server that misses three is
    lost."""
    request_timeout_s: float = Field(600.0, gt=0)
    """A server whose answer to a request is not complete by then is lost; the time to send weights comes on top."""
    reconnect_s: float = Field(120.0, ge=0)
    """Wait for a server to come up, or back, while there is none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for address in self.servers:
            must = "hold addresses of the form http://HOST:PORT"
            check_address("servers", address, must=must, schemes=("http",), port=True, path=False)
        if self.transfer == "broadcast" and self.sync == "adapter":
            must = "be auto or file with sync: adapter, which is small and travels as a file"
            raise BrokenRule("transfer", self.transfer, must, "remove it, or use sync: merged")
        if len(set(self.servers)) < len(self.servers):
            raise BrokenRule("servers", list(self.servers), "name each server once", "remove the second")
        return self


class AutoEngineSettings(Frozen):
    """The engine that fits: vLLM in this process where one rank trains on a GPU, vLLM is installed and the model is of
    a Hub family; elsewhere the embedded one. The log and `alignlab check` say which and why, the run records it, and a
    resumed run with another outcome has another `engine`. Fields are those that both engines share."""

    on_resume = OnResume.MAY_CHANGE
    engine: Recorded[Literal["auto"]] = "auto"
    max_running: int = Field(128, ge=1)
    """Sequences decoded together."""
    prefill_tokens: int = Field(2048, ge=1)
    """Prompt tokens computed in one step."""
    block_size: int | None = Field(None, ge=1)
    """Tokens in a block of the KV cache; default: the engine's own."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_fields_of_one_engine(cls, raw: Any) -> Any:
        for name in raw if isinstance(raw, dict) else ():
            owners = [kind for kind in (RolloutSettings, VLLMSettings) if name in kind.model_fields]
            if owners and name not in cls.model_fields:
                engines = " or ".join(kind.model_fields["engine"].default for kind in owners)
                raise BrokenRule(
                    name, raw[name], "be left out with engine: auto, which takes what both engines share",
                    f"remove it, or use engine: {engines}",
                )
        return raw


EngineSettings = RolloutSettings | VLLMSettings | VLLMServerSettings | AutoEngineSettings
RolloutEngineSettings = Annotated[EngineSettings, Field(discriminator="engine")]


def max_staleness(settings: EngineSettings) -> int:
    """Return the number of steps that a policy may be ahead of the weights that sampled its rollouts."""
    return settings.max_staleness if isinstance(settings, VLLMServerSettings) else 0


def quantization(settings: EngineSettings) -> str | None:
    """Return the quantization of the engine's weights; None if they are the policy's."""
    rounding = rounded_weights(settings)
    if rounding is not None:
        return rounding.type
    return settings.quantization if isinstance(settings, _VLLMSettings) else None


def served_cache(settings: EngineSettings) -> ServedCache | None:
    """Return the name of vLLM's rounded cache; None if it keeps keys and values in the model's dtype."""
    return settings.kv_cache if isinstance(settings, _VLLMSettings) else None


def rounded_weights(settings: EngineSettings) -> RoundedWeights | None:
    """Return the rounding of the embedded engine's weights; None if there is none."""
    return settings.quantization if isinstance(settings, RolloutSettings) else None


def approximate_cache(settings: EngineSettings) -> ApproximateCache | None:
    """Return the settings of the engine's cache if it approximates keys and values; None if it keeps them exactly."""
    cache = settings.kv_cache if isinstance(settings, RolloutSettings) else None
    return None if cache is None or isinstance(cache, ExactCache | MmapCache) else cache


def step_tokens(settings: RolloutSettings) -> int:
    """Return how many tokens of prompts and drafts the embedded engine computes in one step, at most."""
    drafts = 0 if settings.speculation is None else settings.speculation.num_drafts * settings.max_running
    return settings.prefill_tokens + drafts


def cache_group(settings: EngineSettings) -> int:
    """Return how many tokens the engine's cache keeps together; 1 where each is for itself."""
    cache = approximate_cache(settings)
    return cache.group if isinstance(cache, Int4Cache) else 1


def fill_engine(raw: Any) -> Any:
    """Return the engine's settings with the default engine, the embedded one."""
    return {"engine": "embedded"} | raw if isinstance(raw, dict) else raw

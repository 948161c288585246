"""vLLM in this process as a rollout engine: weights of its own, proved to be the policy's after each update."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from vllm import LLM, RequestOutput
from vllm import SamplingParams as VLLMSamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

from alignlab.config.grpo_rules import MAX_VLLM_TEMPERATURE
from alignlab.config.rollout import VLLMSettings
from alignlab.errors import ConfigError, RolloutError
from alignlab.models.adapters import has_adapters
from alignlab.models.attention import causal_lm
from alignlab.models.export import Model, write_base
from alignlab.rollout.detokenizer import decode
from alignlab.rollout.requests import check_prompts, completion_keys, end_token_ids, for_each
from alignlab.rollout.vllm.requirement import require_vllm
from alignlab.rollout.vllm.sync import AdapterSync, MergedSync, WeightSync
from alignlab.rollout.weight_proof import GATES, CanaryGap, canary_gap, check_canary
from alignlab.rollout.weights import changed_weights, weights_stamp
from alignlab.types import Completion, FinishReason, Prompt, Rollout, SamplingParams

_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "aborted"}
_SEED_BITS = 2**63 - 1
_CANARY_SEED = 20_812
_FIRST_UPDATES = 2
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class SyncProof:
    """What the last weight update came to: tensors and bytes sent, and the canary's gap."""

    num_tensors: int
    num_bytes: int
    gap: CanaryGap | None


class VLLMEngine:
    """Generates with vLLM, whose weights are replaced by the policy's at every `update_weights`.

    Args:
        model: the policy, with or without LoRA.
        tokenizer: saved beside the weights; decodes completions.
        settings: sizes and how updates are proved.
        policy_version: of the weights as they are now.

    Attributes:
        proof: of the last update.

    Raises:
        ConfigError: vLLM is missing or untested, or cannot run the model.
    """

    def __init__(
        self, model: Model, tokenizer: PreTrainedTokenizerBase, settings: VLLMSettings, *, policy_version: int = 0
    ) -> None:
        require_vllm()
        _require_one_rank()
        self.policy_version = policy_version
        self.proof: SyncProof | None = None
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        self._lm = causal_lm(model)
        self._sync = _make_sync(model, settings)
        self._num_updates = 0
        self._in_doubt: str | None = None
        self._stamp: tuple[int, ...] = ()
        self._sparse_layers: list[int] = list(getattr(self._lm.config, "sparse_layers", ()))
        self._device = next(model.parameters()).device
        self._llm = self._start()
        if self._sparse_layers and self._device.type == "cpu":
            self._llm.collective_rpc("alignlab_record_routing")
        self._send(policy_version)  # the weights it started with are the base's, and may be an old adapter's

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """`sampling.n` completions of each prompt, in the order of `prompts`.

        Raises:
            RolloutError: a prompt leaves no room for a completion, a parameter is out of range, the last weight update
                failed, or the policy's weights were changed since.
        """
        if self._in_doubt is not None:
            raise RolloutError(
                f"the rollout engine's weights are in doubt since an update that failed: {self._in_doubt}; "
                "update them before generating"
            )
        if self._present() != self._stamp:
            raise changed_weights(self.policy_version)
        return self._generate(prompts, sampling)

    def update_weights(self, policy_version: int) -> None:
        """Take over the policy's present weights, and prove it; what was cached under the old ones is dropped.

        Raises:
            RolloutError: the version does not advance, a tensor did not arrive whole, or the engine's log-probs are
                not the policy's. The engine generates nothing until an update succeeds.
        """
        if policy_version <= self.policy_version:
            raise RolloutError(
                f"policy_version is {policy_version}, and must be over the present one ({self.policy_version}), "
                "because what is cached and recorded is told apart by it; count versions up"
            )
        self._send(policy_version)

    def close(self) -> None:
        """End vLLM and free what it holds of the process, memory and groups of ranks; it generates no more."""
        self._in_doubt = "it was closed"
        self._llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()

    def _send(self, policy_version: int) -> None:
        self._in_doubt = "it did not end"
        try:
            self.proof = self._replace_weights(policy_version)
            self.policy_version, self._stamp = policy_version, self._present()
        except BaseException as error:
            self._in_doubt = str(error) or type(error).__name__
            raise
        self._in_doubt = None

    def _present(self) -> tuple[int, ...]:
        return weights_stamp(self._model.parameters(), self._model.modules())

    def _replace_weights(self, policy_version: int) -> SyncProof:
        sent = self._sync.send(self._llm, policy_version)
        self._llm.reset_prefix_cache()
        settings, number = self._settings, self._num_updates
        if number % settings.digests_every_updates == 0:
            self._sync.check(self._llm, sent)
        # At the first two always: what vLLM does wrong at an update, it does at each but the one that it starts with.
        gap = self._canary() if number < _FIRST_UPDATES or number % settings.canary_every_updates == 0 else None
        self._num_updates += 1
        return SyncProof(len(sent), sum(tensor.numel() * tensor.element_size() for tensor in sent.values()), gap)

    def _start(self) -> LLM:
        """vLLM on a checkpoint of the policy's base, which is deleted once it is loaded."""
        config, settings = self._lm.config.get_text_config(), self._settings
        options: dict[str, Any] = dict(self._sync.options)
        if self._device.type == "cpu":
            # A chunk that does not end a prompt rewinds its request's random numbers, which a CPU generator cannot.
            options["enable_chunked_prefill"] = False
        elif self._sparse_layers:
            options["enable_return_routed_experts"] = True
        if settings.block_size is not None:
            options["block_size"] = settings.block_size
        if settings.cache_gib is not None:
            options["kv_cache_memory_bytes"] = int(settings.cache_gib * 2**30)
        with tempfile.TemporaryDirectory(prefix="alignlab-vllm-") as folder, _own_random_state():
            write_base(self._model, Path(folder))
            self._tokenizer.save_pretrained(folder)
            try:
                return LLM(
                    folder,
                    dtype=_DTYPES[self._lm.dtype],
                    max_model_len=config.max_position_embeddings,
                    max_num_seqs=settings.max_running,
                    max_num_batched_tokens=max(settings.prefill_tokens, config.max_position_embeddings),
                    gpu_memory_utilization=settings.memory_frac,
                    enforce_eager=self._device.type == "cpu" if settings.eager is None else settings.eager,
                    enable_prefix_caching=True,
                    generation_config="vllm",
                    logprobs_mode="processed_logprobs",
                    worker_extension_cls="alignlab.rollout.vllm.worker.Inspection",
                    disable_log_stats=True,
                    seed=0,
                    **options,
                )
            except (ValueError, RuntimeError, NotImplementedError) as error:
                raise ConfigError(
                    f"vLLM cannot run {type(self._lm).__name__}: {error}; use rollout.engine: embedded, or correct "
                    "rollout's sizes"
                ) from error

    def _generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        each = for_each(prompts, sampling)
        longest = self._lm.config.get_text_config().max_position_embeddings
        limit = (longest, "the model's max_position_embeddings", "shorten the prompt or lower max_new_tokens")
        check_prompts(prompts, each, self._lm.config.get_text_config().vocab_size, [limit])
        requests, params = [], []
        for prompt, one, keys in zip(prompts, each, completion_keys(prompts, each), strict=True):
            ends = sorted(end_token_ids(self._lm, self._tokenizer, one))
            # A request for each completion: vLLM takes a seed with n = 1 alone, and shares the prompt all the same.
            requests += [{"prompt_token_ids": list(prompt.token_ids)}] * len(keys)
            params += [_vllm_params(one, key, ends) for key in keys]
        outputs = self._run(requests, params) if requests else []
        found = iter(zip(outputs, self._routing(outputs), strict=True))
        return [
            Rollout(prompt, tuple(self._completion(*next(found), one) for _ in range(one.n)))
            for prompt, one in zip(prompts, each, strict=True)
        ]

    def _run(self, requests: list[Any], params: list[VLLMSamplingParams]) -> list[RequestOutput]:
        with _own_random_state():
            return self._llm.generate(requests, params, use_tqdm=False, lora_request=self._sync.request)

    def _routing(self, outputs: Sequence[RequestOutput]) -> Sequence[Tensor | None]:
        """Experts chosen for each request's tokens [tokens, L, K], -1 where unknown; None for a dense model."""
        if not self._sparse_layers or not outputs:
            return [None] * len(outputs)
        if self._device.type == "cpu":
            names = [request.request_id for request in outputs]
            [records] = self._llm.collective_rpc("alignlab_take_routing", args=(names, self._sparse_layers))
        else:
            every_layer = [torch.from_numpy(request.outputs[0].routed_experts) for request in outputs]
            records = [layers[:, self._sparse_layers].to(torch.int16) for layers in every_layer]
        whole = []
        for request, record in zip(outputs, records, strict=True):
            num_tokens = len(request.prompt_token_ids) + len(request.outputs[0].token_ids)
            filled = torch.full((num_tokens, *record.shape[1:]), -1, dtype=torch.int16)
            filled[: len(record)] = record[:num_tokens]
            whole.append(filled)
        return whole

    def _completion(self, request: RequestOutput, routing: Tensor | None, sampling: SamplingParams) -> Completion:
        [output] = request.outputs
        ids = tuple(output.token_ids)
        reported = tuple(step[token].logprob for step, token in zip(output.logprobs, ids, strict=True))
        text = decode(self._tokenizer, ids)
        if isinstance(output.stop_reason, str):
            text = text[: text.rfind(output.stop_reason)]
        greedy = sampling.temperature == 0
        return Completion(
            token_ids=ids,
            text=text,
            logprobs=(0.0,) * len(ids) if greedy else reported,
            raw_logprobs=reported if _is_plain(sampling) else None,
            finish_reason=_FINISH[output.finish_reason],
            policy_versions=(self.policy_version,) * len(ids),
            routing=routing,
        )

    def _canary(self) -> CanaryGap:
        """Sample from a few prompts, and compare with the trainer's log-probs."""
        settings, generator = self._settings, torch.Generator().manual_seed(_CANARY_SEED)
        shape = (settings.canary_prompts, settings.canary_prompt_tokens)
        ids = torch.randint(len(self._tokenizer), shape, generator=generator)
        prompts = [Prompt(tuple(row), "") for row in ids.tolist()]
        sampling = SamplingParams(max_new_tokens=settings.canary_new_tokens, ignore_eos=True, seed=_CANARY_SEED)
        gap = canary_gap(self._model, self._generate(prompts, sampling))
        gate = GATES[self._lm.dtype] if settings.canary_gate is None else settings.canary_gate
        check_canary(gap, gate)
        return gap


def _require_one_rank() -> None:
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if ranks > 1:
        raise ConfigError(
            f"rollout.engine is vllm, which shares a process with one rank, and the training has {ranks}; "
            "start one process, or use rollout.engine: embedded"
        )


def _make_sync(model: Model, settings: VLLMSettings) -> WeightSync:
    """As the settings say; by default an adapter travels alone to a GPU, and merged to a CPU, where vLLM takes twice as
    long to generate with one."""
    on_gpu = next(model.parameters()).device.type != "cpu"
    alone = settings.sync == "adapter" or (settings.sync == "auto" and on_gpu and has_adapters(model))
    return AdapterSync(model) if alone else MergedSync(model)


@contextmanager
def _own_random_state() -> Iterator[None]:
    """vLLM seeds the global generators when it starts and draws from them when it samples; they are the trainer's."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def _is_plain(sampling: SamplingParams) -> bool:
    """Whether the distribution sampled from is the model's own; at temperature 0 vLLM reports that one too."""
    shaping = (sampling.top_k, sampling.top_p, sampling.min_p, sampling.repetition_penalty)
    return sampling.temperature in (0, 1) and shaping == (0, 1.0, 0.0, 1.0) and sampling.min_new_tokens == 0


def _vllm_params(sampling: SamplingParams, key: int, ends: list[int]) -> VLLMSamplingParams:
    if sampling.temperature > MAX_VLLM_TEMPERATURE:
        raise RolloutError(
            f"sampling.temperature is {sampling.temperature}, and vLLM takes at most {MAX_VLLM_TEMPERATURE:g}; lower "
            "it, or use rollout.engine: embedded"
        )
    return VLLMSamplingParams(
        n=1,
        seed=key & _SEED_BITS,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        max_tokens=sampling.max_new_tokens,
        min_tokens=sampling.min_new_tokens,
        stop=list(sampling.stop),
        stop_token_ids=ends,
        ignore_eos=True,  # all end tokens are named
        logprobs=0,
        detokenize=bool(sampling.stop),
        skip_special_tokens=True,
    )

"""vLLM in the trainer's process."""

from __future__ import annotations

import gc
import os
import random
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from vllm import LLM, RequestOutput
from vllm import SamplingParams as VLLMSamplingParams
from vllm.distributed import parallel_state
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine import core

from alignlab.config.rollout import VLLMSettings
from alignlab.errors import ConfigError
from alignlab.models.decoder import causal_lm
from alignlab.models.hub.export import Model, write_base
from alignlab.models.shards import is_spread
from alignlab.rollout.requests import abandoned
from alignlab.rollout.verification import check_arrived
from alignlab.rollout.vllm.backend import Transfer, num_always_verified
from alignlab.rollout.vllm.completions import Answer, Request, padded
from alignlab.rollout.vllm.installation import require_vllm
from alignlab.rollout.vllm.options import (
    check_model,
    checked_adapter_rank,
    engine_options,
    require_gpus,
    sync_adapter_only,
)
from alignlab.rollout.vllm.policy_weights import PolicyWeights
from alignlab.rollout.vllm.rank_groups import RankGroup, check_groups, own_shared_memory, shares_vllm
from alignlab.rollout.vllm.ranks import has_several_ranks, shared_random_name
from alignlab.rollout.vllm.sleep import Sleep
from alignlab.rollout.vllm.sync import AdapterSync, FullSync, WeightSync


class InProcessBackend:
    """vLLM in this process, sharing the machine with the trainer; a `Backend` of one member, itself.

    Each rank of a training has a vLLM of its own or, with `tensor_parallel` k, each k consecutive ranks share one.

    Args:
        model: policy, with or without LoRA.
        tokenizer: of the policy.
        settings: vLLM's sizes, and how its weights are synced.

    Raises:
        ConfigError: vLLM is missing or untested, the machine has too few GPUs, the ranks cannot share vLLMs as
            `tensor_parallel` asks, vLLM cannot spread or quantize the model, or the adapter cannot be synced alone as
            the settings ask.
    """

    _llm: LLM
    _sync: WeightSync
    _sleep: Sleep
    _group: RankGroup | None
    first_rank_sends = False

    def __init__(self, model: Model, tokenizer: PreTrainedTokenizerBase, settings: VLLMSettings) -> None:
        require_vllm("vllm")
        self.is_verified = False
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        self._lm = causal_lm(model)
        self._on_cpu = self._lm.device.type == "cpu"
        self.adapter_only = sync_adapter_only(settings, model, on_cpu=self._on_cpu)
        self._adapter_rank = checked_adapter_rank(model) if self.adapter_only else 0
        self._sparse_layers: list[int] = list(getattr(self._lm.config, "sparse_layers", ()))
        self._sleeps = not self._on_cpu if settings.sleep is None else settings.sleep
        check_model(self._lm, settings, on_cpu=self._on_cpu)
        check_groups(settings)
        self._shares_vllm, self._group = shares_vllm(settings), None
        if not self._on_cpu and not self._shares_vllm:
            require_gpus(settings.tensor_parallel, torch.cuda.device_count())
        self._abandoned = threading.Event()
        self._num_puts = self._policy_version = 0

    def open(self) -> None:
        """Start vLLM on a checkpoint of the policy's base, which is deleted once it is loaded."""
        if self._settings.tensor_parallel > 1:  # on a CPU, workers would want a memory node each
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        options = engine_options(self._settings, self._model, adapter_rank=self._adapter_rank, on_cpu=self._on_cpu)
        if has_several_ranks():
            # vLLM then finds the trainer's processes, each of which has one worker; `tensor_parallel` of them are one
            # model to it.
            options["distributed_executor_backend"] = "external_launcher"
        if self._shares_vllm:
            self._group = RankGroup(self._settings.tensor_parallel)
        # In one process, each worker of a model in parts is a process of its own.
        by_file = self._settings.tensor_parallel > 1 and not self._shares_vllm
        self._sync = AdapterSync() if self.adapter_only else FullSync(by_file=by_file)
        with tempfile.TemporaryDirectory(prefix="alignlab-vllm-") as folder, _trainers_random_state_kept():
            write_base(self._model, Path(folder))  # of weights that are spread over ranks, by all together
            self._tokenizer.save_pretrained(folder)
            try:
                with own_shared_memory(shared_random_name()) if self._shares_vllm else nullcontext():
                    self._llm = LLM(folder, enable_sleep_mode=self._sleeps, **options)
            except (ValueError, RuntimeError, NotImplementedError) as error:
                raise ConfigError(
                    f"vLLM cannot run {type(self._lm).__name__}: {error}; use rollout.engine: embedded, or correct "
                    "rollout's sizes"
                ) from error
        self.is_verified = False
        # Weights that are spread over ranks are not gathered again between two updates, in which ranks do not meet.
        level = 1 if is_spread(self._model) else self._sync.sleep_level
        self._sleep = Sleep(self._llm, level=level, is_enabled=self._sleeps)
        if self._records_routing:
            self._llm.collective_rpc("alignlab_record_routing")

    def put_weights(self, weights: PolicyWeights, policy_version: int, attempt: int) -> Transfer:
        """Replace vLLM's weights; digests are compared at first, and every `digests_every_updates` calls."""
        is_first = self._num_puts < num_always_verified(on_gpu=self.on_gpu)
        is_due = is_first or self._num_puts % self._settings.digests_every_updates == 0
        transfer = self._replace_weights(weights, policy_version, attempt, check_digests=is_due)
        self._policy_version = policy_version
        self._num_puts += 1
        return transfer

    def members(self) -> Sequence[InProcessBackend]:
        """Return this vLLM."""
        return (self,)

    def agreed(self) -> AbstractContextManager[None]:
        """Return a context in which the ranks that share this vLLM prepare their requests."""
        return nullcontext() if self._group is None else self._group.agreed()

    def answers(self, requests: Sequence[Request], member: InProcessBackend | None = None) -> list[Answer]:
        """Return one completion for each request, in order."""
        everything, own = list(requests), slice(len(requests))
        if self._group is not None:
            everything, own = self._group.gathered(requests)
        if not everything:
            return []
        prompts: list[Any] = [{"prompt_token_ids": list(request.token_ids)} for request in everything]
        params = [_sampling_params(request) for request in everything]
        self._wake()
        with _trainers_random_state_kept(), self._can_be_abandoned():
            outputs = self._llm.generate(prompts, params, use_tqdm=False, lora_request=self._sync.lora_request)
        pairs = list(zip(outputs, self._routing(outputs), strict=True))
        return [self._answer(*pair) for pair in pairs[own]]

    def rest(self) -> None:
        """Put vLLM to sleep until the next call, where the settings say so."""
        self._sleep.begin()

    def abandon(self) -> None:
        """Make the call in flight raise before its next step or, where ranks share this vLLM, at its end."""
        self._abandoned.set()

    def close(self) -> None:
        """End vLLM, and free its memory and its groups of ranks."""
        with _trainers_ranks_kept():
            self._llm.llm_engine.engine_core.shutdown()
            del self._llm
            core.cleanup_dist_env_and_memory()

    def metrics(self) -> dict[str, float]:
        """Return no figures."""
        return {}

    @property
    def on_gpu(self) -> bool:
        """True if vLLM, like the policy, is on a GPU."""
        return not self._on_cpu

    @property
    def model_runner(self) -> int:
        """Number of the model runner that vLLM uses."""
        return 2 if self._llm.llm_engine.vllm_config.use_v2_model_runner else 1

    @property
    def _records_routing(self) -> bool:
        """True where our recorder keeps the experts chosen; vLLM's own needs a GPU."""
        return bool(self._sparse_layers) and self._on_cpu

    def _replace_weights(
        self, weights: PolicyWeights, policy_version: int, attempt: int, *, check_digests: bool
    ) -> Transfer:
        """Load weights while the KV cache is not allocated: its room is enough for a merged copy of the weights."""
        self._sleep.wake_weights()
        transfer = self._load(weights, policy_version, attempt, check_digests=check_digests)
        self._sleep.wake_cache()
        self._llm.reset_prefix_cache()  # vLLM keeps the old weights' keys and values otherwise
        return transfer

    def _load(self, weights: PolicyWeights, policy_version: int, attempt: int, *, check_digests: bool) -> Transfer:
        """Load weights, of which no copy is left at the end."""
        weights.has_digests = check_digests
        self._sync.load(self._llm, weights, policy_version, attempt)
        if check_digests:
            check_arrived(weights.digests(), self._sync.arrived(self._llm))
        self._sleep.lacks_weights = False
        return weights.size

    def _wake(self) -> None:
        """Make vLLM able to generate from the weights of the last update."""
        if self._sleep.lacks_weights:  # the policy's are still the same
            weights = PolicyWeights(self._model, adapter_only=False)
            self._replace_weights(weights, self._policy_version, 0, check_digests=True)
        self._sleep.wake_weights()
        self._sleep.wake_cache()

    @contextmanager
    def _can_be_abandoned(self) -> Iterator[None]:
        """Let `abandon` interrupt vLLM between two steps; whatever interrupts it, no request is left in vLLM."""
        engine: Any = self._llm.llm_engine
        step = engine.step
        self._abandoned.clear()

        def step_unless_abandoned() -> Any:
            if self._abandoned.is_set() and self._group is None:  # the others would wait for this rank's part
                raise abandoned()
            return step()

        engine.step = step_unless_abandoned
        try:
            yield
            if self._abandoned.is_set() and self._group is not None:
                raise abandoned()
        except BaseException:
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise
        finally:
            engine.step = step

    def _answer(self, request: RequestOutput, routing: Tensor | None) -> Answer:
        [output] = request.outputs
        ids = tuple(output.token_ids)
        return Answer(
            token_ids=ids,
            logprobs=tuple(step[token].logprob for step, token in zip(output.logprobs, ids, strict=True)),
            finish_reason=output.finish_reason,
            stop_text=output.stop_reason if isinstance(output.stop_reason, str) else None,
            policy_versions=(self._policy_version,) * len(ids),
            routing=routing,
        )

    def _routing(self, outputs: Sequence[RequestOutput]) -> Sequence[Tensor | None]:
        """Return the experts chosen for each request's tokens [tokens, L, K], -1 if unknown; None for a dense model."""
        if not self._sparse_layers:
            return [None] * len(outputs)
        if self._records_routing:
            names = [request.request_id for request in outputs]
            workers = self._llm.collective_rpc("alignlab_take_routing", args=(names, self._sparse_layers))
            records = workers[0]  # every worker of a model in parts computes the whole router
        else:
            all_layers = [torch.from_numpy(request.outputs[0].routed_experts) for request in outputs]
            records = [experts[:, self._sparse_layers] for experts in all_layers]
        return [
            padded(record, len(request.prompt_token_ids) + len(request.outputs[0].token_ids))
            for request, record in zip(outputs, records, strict=True)
        ]


@contextmanager
def _trainers_ranks_kept() -> Iterator[None]:
    """Let vLLM leave the process group of the ranks as it is, which it would end at its own end."""
    own = core.cleanup_dist_env_and_memory
    if has_several_ranks():
        core.cleanup_dist_env_and_memory = _leave_ranks
    try:
        yield
    finally:
        core.cleanup_dist_env_and_memory = own


def _leave_ranks() -> None:
    """Free vLLM's own groups of ranks, and its memory."""
    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
    parallel_state._WORLD = parallel_state._NODE_COUNT = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _trainers_random_state_kept() -> Iterator[None]:
    """Restore the global random generators afterwards: vLLM seeds them at its start, and draws from them."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):  # of all GPUs in view it would warn
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def _sampling_params(request: Request) -> VLLMSamplingParams:
    """Return the parameters of a request as vLLM's own."""
    grammar = request.params.get("structured_outputs")
    nested = {} if grammar is None else {"structured_outputs": StructuredOutputsParams(**grammar)}
    return VLLMSamplingParams(**request.params | nested)

"""vLLM in this process as a rollout engine."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from vllm import LLM, RequestOutput
from vllm import SamplingParams as VLLMSamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

from alignlab.config.rollout import VLLMSettings
from alignlab.errors import ConfigError
from alignlab.models.export import Model, write_base
from alignlab.rollout.vllm.completions import Answer, Request, padded
from alignlab.rollout.vllm.options import engine_options, travels_alone
from alignlab.rollout.vllm.proved import ProvedEngine
from alignlab.rollout.vllm.requirement import require_vllm
from alignlab.rollout.vllm.sync import AdapterSync, MergedSync, WeightSync


class VLLMEngine(ProvedEngine):
    """vLLM in this process, sharing the machine with the trainer; see `ProvedEngine`.

    Raises:
        ConfigError: vLLM is missing or untested, or cannot run the model.
    """

    _settings: VLLMSettings

    def __init__(
        self, model: Model, tokenizer: PreTrainedTokenizerBase, settings: VLLMSettings, *, policy_version: int = 0
    ) -> None:
        require_vllm("vllm")
        _require_one_rank()
        super().__init__(model, tokenizer, settings, policy_version=policy_version)
        self._sync = _make_sync(model, settings)
        self._sparse_layers: list[int] = list(getattr(self._lm.config, "sparse_layers", ()))
        self._device = next(model.parameters()).device
        self._sleeps = self._device.type != "cpu" if settings.sleep is None else settings.sleep
        self._asleep = False
        self._llm = self._start()
        if self._sparse_layers and self._device.type == "cpu":
            self._llm.collective_rpc("alignlab_record_routing")
        self._update(policy_version)  # the weights it started with are the base's, and may be an old adapter's

    def close(self) -> None:
        """End vLLM and free what it holds of the process, memory and groups of ranks; it generates no more."""
        self._in_doubt = "it was closed"
        self._llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()

    def rest(self) -> None:
        """Sleep, where the settings say so, until the next call."""
        if self._sleeps and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def _replace_weights(self, policy_version: int) -> Mapping[str, Tensor]:
        self._wake()
        sent = self._sync.send(self._llm, policy_version)
        self._llm.reset_prefix_cache()
        if self._num_updates % self._settings.digests_every_updates == 0:
            self._sync.check(self._llm, sent)
        return sent

    def _start(self) -> LLM:
        """vLLM on a checkpoint of the policy's base, which is deleted once it is loaded."""
        options = engine_options(
            self._settings,
            dtype=self._lm.dtype,
            context_tokens=self.context_tokens,
            on_cpu=self._device.type == "cpu",
            sparse=bool(self._sparse_layers),
        )
        with tempfile.TemporaryDirectory(prefix="alignlab-vllm-") as folder, _own_random_state():
            write_base(self._model, Path(folder))
            self._tokenizer.save_pretrained(folder)
            try:
                return LLM(folder, enable_sleep_mode=self._sleeps, **options, **self._sync.options)
            except (ValueError, RuntimeError, NotImplementedError) as error:
                raise ConfigError(
                    f"vLLM cannot run {type(self._lm).__name__}: {error}; use rollout.engine: embedded, or correct "
                    "rollout's sizes"
                ) from error

    def _answers(self, requests: Sequence[Request]) -> list[Answer]:
        prompts: list[Any] = [{"prompt_token_ids": list(request.token_ids)} for request in requests]
        params = [VLLMSamplingParams(**request.params) for request in requests]
        self._wake()
        with _own_random_state():
            outputs = self._llm.generate(prompts, params, use_tqdm=False, lora_request=self._sync.request)
        return [self._answer(*each) for each in zip(outputs, self._routing(outputs), strict=True)]

    def _answer(self, request: RequestOutput, routing: Tensor | None) -> Answer:
        [output] = request.outputs
        ids = tuple(output.token_ids)
        return Answer(
            token_ids=ids,
            logprobs=tuple(step[token].logprob for step, token in zip(output.logprobs, ids, strict=True)),
            finish_reason=output.finish_reason,
            stop_text=output.stop_reason if isinstance(output.stop_reason, str) else None,
            policy_versions=(self.policy_version,) * len(ids),
            routing=routing,
        )

    def _routing(self, outputs: Sequence[RequestOutput]) -> Sequence[Tensor | None]:
        """Experts chosen for each request's tokens [tokens, L, K], -1 where unknown; None for a dense model."""
        if not self._sparse_layers:
            return [None] * len(outputs)
        if self._device.type == "cpu":
            names = [request.request_id for request in outputs]
            [records] = self._llm.collective_rpc("alignlab_take_routing", args=(names, self._sparse_layers))
        else:
            every_layer = [torch.from_numpy(request.outputs[0].routed_experts) for request in outputs]
            records = [layers[:, self._sparse_layers] for layers in every_layer]
        return [
            padded(record, len(request.prompt_token_ids) + len(request.outputs[0].token_ids))
            for request, record in zip(outputs, records, strict=True)
        ]


def _require_one_rank() -> None:
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if ranks > 1:
        raise ConfigError(
            f"rollout.engine is vllm, which shares a process with one rank, and the training has {ranks}; "
            "start one process, or use rollout.engine: vllm_server or embedded"
        )


def _make_sync(model: Model, settings: VLLMSettings) -> WeightSync:
    on_cpu = next(model.parameters()).device.type == "cpu"
    alone = travels_alone(settings, model, on_cpu=on_cpu)
    return AdapterSync(model) if alone else MergedSync(model)


@contextmanager
def _own_random_state() -> Iterator[None]:
    """vLLM seeds the global generators when it starts and draws from them when it samples; they are the trainer's."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(numpy)

"""What vLLM engines share, wherever vLLM runs: weights of their own, replaced and proved at every update.

`VLLMEngine` and `VLLMServerEngine` say how requests are answered and how weights travel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alignlab.config.rollout import VLLMServerSettings, VLLMSettings
from alignlab.errors import ConfigError, RolloutError
from alignlab.models.attention import causal_lm
from alignlab.models.export import Model
from alignlab.rollout.requests import check_prompts, for_each
from alignlab.rollout.vllm.completions import Answer, Request, make_completion, make_requests
from alignlab.rollout.weight_proof import GATES, CanaryGap, canary_gap, check_canary
from alignlab.rollout.weights import changed_weights, weights_stamp
from alignlab.types import Prompt, Rollout, SamplingParams

_CANARY_SEED = 20_812
_FIRST_UPDATES = 2
Answers = Callable[[Sequence[Request]], Sequence[Answer]]


@dataclass(frozen=True)
class SyncProof:
    """What the last weight update came to: tensors and bytes sent, and the canary's gap, the largest of any server."""

    num_tensors: int
    num_bytes: int
    gap: CanaryGap | None


class ProvedEngine(ABC):
    """Generates with vLLM, whose weights are replaced by the policy's at every `update_weights`.

    Args:
        model: the policy, with or without LoRA.
        tokenizer: decodes completions.
        settings: sizes and how updates are proved.
        policy_version: of the weights as they are now.

    Attributes:
        proof: of the last update.
    """

    _settings: VLLMSettings | VLLMServerSettings
    _may_run_behind = False  # whether the policy may move on while completions are sampled

    def __init__(
        self, model: Model, tokenizer: PreTrainedTokenizerBase, settings: VLLMSettings | VLLMServerSettings,
        *, policy_version: int = 0,
    ) -> None:
        self.policy_version = policy_version
        self.proof: SyncProof | None = None
        self._model, self._tokenizer = model, tokenizer
        self._settings = settings
        self._lm = causal_lm(model)
        self._parameters = list(model.parameters())  # a critic's role on the same base comes later, and is not sent
        self._num_updates = 0
        self._last_gap: CanaryGap | None = None
        self._in_doubt: str | None = "they were never sent"
        self._stamp: tuple[int, ...] = ()

    @abstractmethod
    def _answers(self, requests: Sequence[Request]) -> Sequence[Answer]:
        """One completion for each request, in order."""

    @abstractmethod
    def _replace_weights(self, policy_version: int) -> Mapping[str, Tensor]:
        """Have vLLM use the policy's present weights and drop what was cached; returns what travelled.

        Raises:
            RolloutError: what arrived is not what was sent.
        """

    def _proves(self) -> bool:
        """Whether this update is proved by a canary.

        At the first two always: what vLLM does wrong at an update, it does at each but the one that it starts with.
        """
        number = self._num_updates
        return number < _FIRST_UPDATES or number % self._settings.canary_every_updates == 0

    def _canaries(self) -> list[CanaryGap]:
        """The gap of each vLLM that runs."""
        return [self._canary(self._answers)]

    @property
    def context_tokens(self) -> int:
        """Limit of prompt and completion together."""
        positions = getattr(self._lm.config.get_text_config(), "max_position_embeddings", None)
        limits = [limit for limit in (positions, self._settings.context_tokens) if limit is not None]
        if not limits:
            raise ConfigError(
                f"rollout.context_tokens is null, and must be given: the config of {type(self._lm).__name__} names no "
                "limit of its own; use the longest prompt and completion together"
            )
        return min(limits)

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
        if not self._may_run_behind and self._present() != self._stamp:
            raise changed_weights(self.policy_version)
        return self._generate(prompts, sampling, self._answers)

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
        self._update(policy_version)

    def rest(self) -> None:  # noqa: B027
        """Called when nothing will be generated for a while: what shares the trainer's device may make room."""

    def metrics(self) -> dict[str, float]:
        """Nats by which the last canary was off, at most."""
        return {} if self._last_gap is None else {"engine/canary_gap": self._last_gap.largest}

    def _update(self, policy_version: int) -> None:
        if not self._may_run_behind:  # else requests go on under the weights that a server has
            self._in_doubt = "it did not end"
        try:
            self.proof = self._replace_and_prove(policy_version)
            self.policy_version, self._stamp = policy_version, self._present()
        except BaseException as error:
            self._in_doubt = str(error) or type(error).__name__
            raise
        self._in_doubt = None

    def _present(self) -> tuple[int, ...]:
        return weights_stamp(self._parameters, self._model.modules())

    def _replace_and_prove(self, policy_version: int) -> SyncProof:
        sent = self._replace_weights(policy_version)
        gaps = self._canaries() if self._proves() else []
        gap = max(gaps, key=lambda gap: gap.largest, default=None)
        self._last_gap = gap or self._last_gap
        self._num_updates += 1
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in sent.values())
        return SyncProof(len(sent), num_bytes, gap)

    def _generate(self, prompts: Sequence[Prompt], sampling: SamplingParams, answers: Answers) -> list[Rollout]:
        each = for_each(prompts, sampling)
        longest = getattr(self._lm.config.get_text_config(), "max_position_embeddings", None)
        shorten = "shorten the prompt or lower max_new_tokens"
        limits = [
            (longest, "the model's max_position_embeddings", shorten),
            (self._settings.context_tokens, "rollout.context_tokens", f"raise context_tokens, {shorten}"),
        ]
        check_prompts(prompts, each, self._lm.config.get_text_config().vocab_size, limits)
        requests = make_requests(prompts, each, self._lm, self._tokenizer)
        found = iter(answers(requests) if requests else ())
        return [
            Rollout(prompt, tuple(make_completion(next(found), self._tokenizer, one, self._lm) for _ in range(one.n)))
            for prompt, one in zip(prompts, each, strict=True)
        ]

    def _canary(self, answers: Answers) -> CanaryGap:
        """Sample from a few prompts, and compare with the trainer's log-probs."""
        settings, generator = self._settings, torch.Generator().manual_seed(_CANARY_SEED)
        shape = (settings.canary_prompts, settings.canary_prompt_tokens)
        ids = torch.randint(len(self._tokenizer), shape, generator=generator)
        prompts = [Prompt(tuple(row), "") for row in ids.tolist()]
        sampling = SamplingParams(max_new_tokens=settings.canary_new_tokens, ignore_eos=True, seed=_CANARY_SEED)
        gap = canary_gap(self._model, self._generate(prompts, sampling, answers))
        gate = GATES[self._lm.dtype] if settings.canary_gate is None else settings.canary_gate
        check_canary(gap, gate)
        return gap

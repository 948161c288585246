"""The rollout engine over vLLM: weights are sent, verified, and only then generated from."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from transformers import PreTrainedTokenizerBase

from alignlab.config.rollout import VLLMServerSettings, VLLMSettings, max_staleness
from alignlab.errors import RolloutError
from alignlab.models.decoder import causal_lm
from alignlab.models.empty import is_empty
from alignlab.models.exact_weights import model_dtype
from alignlab.models.hub.export import Model
from alignlab.models.shards import is_spread
from alignlab.rollout.policy_version import changed_weights, check_advances, weights_stamp
from alignlab.rollout.requests import check_prompts, length_limits, sampling_of_prompts
from alignlab.rollout.verification import CanaryGap, canary_gap, check_canary, compute_along, default_gate
from alignlab.rollout.vllm.backend import Backend, Member, MemberLost, Transfer, num_always_verified
from alignlab.rollout.vllm.completions import Answer, Request, make_completion, make_requests
from alignlab.rollout.vllm.policy_weights import PolicyWeights
from alignlab.rollout.vllm.ranks import first_rank_first, largest_of_ranks, this_rank, together
from alignlab.rollout.vllm.weight_group import BroadcastBroken
from alignlab.types import Prompt, Rollout, SamplingParams

logger = logging.getLogger(__name__)
_CANARY_SEED = 20_812
_MAX_BROADCASTS = 8
"""Attempts of one update that a server may break off."""
_WORK = "update vLLM's weights"
Answers = Callable[[Sequence[Request]], Sequence[Answer]]


@dataclass(frozen=True)
class SyncReport:
    """Outcome of a weight update.

    Attributes:
        transfer: what was sent.
        gap: largest of the canaries' gaps; None where no canary was due.
    """

    transfer: Transfer
    gap: CanaryGap | None


class VerifiedEngine:
    """A `RolloutEngine` over vLLM, whose copy of the weights is replaced and verified at every update.

    With servers and `max_staleness` over 0, `update_weights` may run while another thread is in `generate`: requests in
    flight go on under the new weights, and each token is recorded with the version that sampled it.

    Args:
        model: policy, with or without LoRA.
        tokenizer: decodes completions.
        settings: limits, and how often updates are verified.
        backend: vLLM; opened, and given the present weights, here. It stays closed for a model without weights.
        policy_version: version of the present weights.

    Attributes:
        policy_version: version of the weights in use.
        last_sync: report of the last update that succeeded.

    Raises:
        ConfigError: vLLM cannot run the model, or no server does.
    """

    last_sync: SyncReport

    def __init__(
        self, model: Model, tokenizer: PreTrainedTokenizerBase, settings: VLLMSettings | VLLMServerSettings,
        backend: Backend, *, policy_version: int = 0,
    ) -> None:
        self.policy_version = policy_version
        self._model, self._tokenizer, self._settings, self._backend = model, tokenizer, settings, backend
        self._lm = causal_lm(model)
        self._parameters = list(model.parameters())  # a critic's head on this base comes later, and is not sent
        self._may_lag = max_staleness(settings) > 0
        self._is_open = False
        self._num_attempts = self._num_updates = 0
        self._last_gap: CanaryGap | None = None
        self._sync_error: str | None = None
        self._model_runner: dict[str, float] = {}
        self._weights_version: tuple[int, ...] = ()
        if not is_empty(model):
            self._open()

    def _open(self) -> None:
        try:
            self._sync(self.policy_version)
        except BaseException:
            self.close()
            raise
        if this_rank() == 0:
            text = f"alignlab: rollouts by vLLM, on model runner V{self._backend.model_runner}"
            print(text, file=sys.stderr, flush=True)

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams]
    ) -> list[Rollout]:
        """Sample `sampling.n` completions of each prompt, in the order of `prompts`.

        Args:
            sampling: one for all prompts, or one for each.

        Raises:
            RolloutError: a prompt leaves no room for a completion, a parameter is out of range, the last weight update
                failed, or the policy's weights were changed since.
        """
        with self._backend.agreed():
            self._require_present_weights()
            params = sampling_of_prompts(prompts, sampling)
            requests = self._requests(prompts, params)
        return self._rollouts(prompts, params, self._backend.answers(requests))

    def update_weights(self, policy_version: int) -> None:
        """Send the policy's present weights to vLLM, and verify them. All ranks call it together.

        An engine that was closed is opened again.

        Raises:
            RolloutError: the version does not advance, a tensor did not arrive as it was sent, or vLLM's log-probs are
                not the policy's. Nothing is generated until an update succeeds.
        """
        check_advances(policy_version, self.policy_version)
        self._sync(policy_version)

    def rest(self) -> None:
        """Let vLLM free memory of the trainer's device until the next call."""
        if self._is_open:
            self._backend.rest()

    def abandon(self) -> None:
        """Make every `generate` in flight raise a RolloutError soon; may be called from any thread."""
        if self._is_open:
            self._backend.abandon()

    def close(self) -> None:
        """Release vLLM's processes and memory, and its servers to other runs; a second call does nothing."""
        if self._is_open:
            self._is_open = False
            self._backend.close()

    def metrics(self) -> dict[str, float]:
        """Return the largest gap of the last canary, nats, vLLM's model runner, and the backend's figures."""
        gap = {} if self._last_gap is None else {"engine/canary_gap": self._last_gap.largest}
        return gap | self._model_runner | self._backend.metrics()

    def _require_present_weights(self) -> None:
        if self._sync_error is not None:
            raise RolloutError(
                f"the rollout engine's weights are in doubt since an update that failed: {self._sync_error}; "
                "update them before generating"
            )
        if not self._is_open:
            raise RolloutError("the rollout engine was closed; update its weights before generating")
        if not self._may_lag and self._present_version() != self._weights_version:
            raise changed_weights(self.policy_version)

    def _sync(self, policy_version: int) -> None:
        if not self._may_lag:  # otherwise requests in flight go on under the weights that a server has
            self._sync_error = "the update did not end"
        try:
            if not self._is_open:
                self._backend.open()
                self._is_open = True
                self._model_runner = {"engine/model_runner": float(self._backend.model_runner)}
            transfer = self._send(policy_version)
            gap = self._verify()
        except BaseException as error:
            self._sync_error = str(error) or type(error).__name__
            raise
        self._num_updates += 1
        self._last_gap = gap or self._last_gap
        self.last_sync = SyncReport(transfer, gap)
        self.policy_version, self._weights_version, self._sync_error = policy_version, self._present_version(), None

    def _send(self, policy_version: int) -> Transfer:
        """Give vLLM the present weights; again if a server fails in the middle of a broadcast, to those that are left.
        """
        for _ in range(_MAX_BROADCASTS):
            try:
                return self._send_once(policy_version)
            except BroadcastBroken as error:
                last_error = error
                if this_rank() == 0:
                    logger.warning("%s; sending the weights again", error)
        raise RolloutError(f"{last_error}, {_MAX_BROADCASTS} times; use rollout.transfer: file, or see the servers")

    def _send_once(self, policy_version: int) -> Transfer:
        """Give vLLM the present weights; ranks whose weights are spread over them read the stream together."""
        self._num_attempts += 1
        weights = PolicyWeights(self._model, adapter_only=self._backend.adapter_only)
        in_order = first_rank_first(weights.finish) if self._backend.first_rank_sends else together(_WORK)
        with in_order:
            try:
                return self._backend.put_weights(weights, policy_version, self._num_attempts)
            finally:
                weights.finish()

    def _present_version(self) -> tuple[int, ...]:
        """Return a value that changes whenever the policy's weights do."""
        return weights_stamp(self._parameters, self._model.modules())

    def _verify(self) -> CanaryGap | None:
        """Compare vLLM's log-probs with the trainer's; return the largest gap, None where no canary is due here.

        The first updates are always verified, see `num_always_verified`. Every rank calls this together: with weights
        that are spread over ranks, the trainer's log-probs are computed by all of them.

        Raises:
            RolloutError: a log-prob differs by more than the gate, or every member was lost.
        """
        with together(_WORK):
            canaries = self._canaries()
        num_passes = largest_of_ranks(len(canaries)) if is_spread(self._model) else len(canaries)
        with together(_WORK):
            gaps = [canary_gap(self._model, rollouts) for _, rollouts in canaries]
            for _ in range(num_passes - len(canaries)):
                compute_along(self._model)
            for (member, _), gap in zip(canaries, gaps, strict=True):
                check_canary(gap, self._gate())
                member.is_verified = True
        return max(gaps, key=lambda gap: gap.largest, default=None)

    def _canaries(self) -> list[tuple[Member, list[Rollout]]]:
        """Return a few completions of random prompts by each member whose log-probs are to be verified now."""
        number, members = self._num_updates, self._backend.members()
        is_first = number < num_always_verified(on_gpu=self._backend.on_gpu)
        is_due = is_first or number % self._settings.canary_every_updates == 0
        if not members or (not is_due and all(member.is_verified for member in members)):
            return []
        canaries = []
        for member in members:
            try:
                canaries.append((member, self._sampled(partial(self._backend.answers, member=member))))
            except MemberLost:
                continue  # verified when it returns
        if not canaries:
            raise RolloutError("every vLLM server was lost at its canary; see what they say, and start them again")
        return canaries

    def _sampled(self, answers: Answers) -> list[Rollout]:
        """Return completions of a few random prompts."""
        settings, generator = self._settings, torch.Generator().manual_seed(_CANARY_SEED)
        shape = (settings.canary_prompts, settings.canary_prompt_tokens)
        ids = torch.randint(len(self._tokenizer), shape, generator=generator)
        prompts = [Prompt(tuple(row), "") for row in ids.tolist()]
        sampling = SamplingParams(max_new_tokens=settings.canary_new_tokens, ignore_eos=True, seed=_CANARY_SEED)
        params = sampling_of_prompts(prompts, sampling)
        return self._rollouts(prompts, params, answers(self._requests(prompts, params)))

    def _gate(self) -> float:
        """Return the largest difference of a canary's log-prob that is allowed, nats."""
        settings = self._settings
        if settings.canary_gate is not None:
            return settings.canary_gate
        return default_gate(model_dtype(self._lm), settings.quantization, settings.kv_cache)

    def _requests(self, prompts: Sequence[Prompt], params_of_prompts: Sequence[SamplingParams]) -> list[Request]:
        """Return a request for each completion of each prompt."""
        config = self._lm.config.get_text_config()
        limits = length_limits(
            self._lm, self._settings.context_tokens, "rollout.context_tokens",
            shorten="shorten the prompt or lower max_new_tokens",
        )
        check_prompts(prompts, params_of_prompts, config.vocab_size, limits)
        return make_requests(prompts, params_of_prompts, self._lm, self._tokenizer)

    def _rollouts(
        self, prompts: Sequence[Prompt], params_of_prompts: Sequence[SamplingParams], answers: Sequence[Answer]
    ) -> list[Rollout]:
        """Return the completions of each prompt, from the answers to their requests."""
        in_order = iter(answers)
        rollouts = []
        for prompt, params in zip(prompts, params_of_prompts, strict=True):
            group = islice(in_order, params.n)
            completions = [make_completion(answer, self._tokenizer, params, self._lm) for answer in group]
            rollouts.append(Rollout(prompt, tuple(completions)))
        return rollouts

"""The embedded rollout engine: generates from the policy's own weights, in the trainer's process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from alignlab.config.rollout import RolloutSettings, cache_group
from alignlab.cpu_threads import follow_free_cores
from alignlab.errors import RolloutError
from alignlab.models.decoder import causal_lm, require_paging
from alignlab.models.kv_approximation.choice import check_cache, measure_cache
from alignlab.models.shards import copy_whole, is_spread, whole_copy
from alignlab.rollout.detokenizer import Detokenizer, decode
from alignlab.rollout.embedded.beam_search import PromptBeams
from alignlab.rollout.embedded.beams import BeamParams, BeamResult
from alignlab.rollout.embedded.block_manager import block_size_for
from alignlab.rollout.embedded.cache_space import CacheSpace
from alignlab.rollout.embedded.call_guard import CallGuard
from alignlab.rollout.embedded.contrastive import ContrastiveParams, ContrastiveSearch
from alignlab.rollout.embedded.native.choice import make_runner
from alignlab.rollout.embedded.runner import Records
from alignlab.rollout.embedded.sample_step import sample_outputs
from alignlab.rollout.embedded.sampler import record_logprobs, scored_targets
from alignlab.rollout.embedded.scheduler import Scheduler, Step
from alignlab.rollout.embedded.search import Computed, Search, SearchParams, advance, in_batches, last_rows
from alignlab.rollout.embedded.sequence import TokenSequence, make_request, scored_sequences
from alignlab.rollout.embedded.speculation import make_speculation
from alignlab.rollout.memory import cache_may_stay
from alignlab.rollout.policy_version import changed_weights, check_advances
from alignlab.rollout.requests import (
    LengthLimit,
    check_completions,
    check_prompts,
    completion_keys,
    end_token_ids,
    length_limits,
    sampling_of_prompts,
)
from alignlab.types import Completion, Prompt, Rollout, SamplingParams

Progress = Callable[[int, int], None]
"""Called after each step with the number of tokens sampled and of sequences finished so far."""


class EmbeddedEngine:
    """A rollout engine with a paged cache and continuous batching; see `scheduler` and `paged_attention`.

    Args:
        model: a causal language model whose attention is "alignlab", with or without LoRA.
        tokenizer: decodes completions; its end token ends them.
        settings: sizes, see `RolloutSettings`.
        policy_version: version of the present weights.
        share_prefixes: compute a common beginning of sequences once.

    Raises:
        ConfigError: the model's attention is another, an adapter cannot be merged, a layer cannot have the cache that
            the settings name, or a GPU cannot read blocks of this size.

    Attributes:
        num_preempted: sequences that had to free their blocks, since the engine was made.
        num_computed: tokens that went through the model, since the engine was made.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: RolloutSettings,
        *, policy_version: int = 0, share_prefixes: bool = True,
    ) -> None:
        self.policy_version = policy_version
        self.num_preempted = 0
        self.num_computed = 0
        self._tokenizer = tokenizer
        self._settings = settings
        self._share = share_prefixes
        require_paging(model)
        check_cache(model, settings)
        self._policy, self._copy = model, None
        if is_spread(model):  # decoding gathers no weights: it has a copy that is whole on this rank
            model = self._copy = whole_copy(model)
        self._lm = causal_lm(model)
        self._block_size = block_size_for(settings.block_size, self._lm.device, group=cache_group(settings))
        self._weights, self._runner = make_runner(model, settings, self._block_size)
        self._space = CacheSpace(self._runner, settings, self._block_size, share=share_prefixes, swaps=True)
        self._sampler = self._runner.sampler()
        self._speculation = make_speculation(settings, model, tokenizer, self._vocab_size, self._weights)
        self._calls = CallGuard()

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams],
        *, on_step: Progress | None = None,
    ) -> list[Rollout]:
        """Sample `sampling.n` completions of each prompt, in the order of `prompts`.

        Args:
            prompts: the prompts.
            sampling: one for all prompts, or one for each.
            on_step: called with the progress after each step.

        Raises:
            RolloutError: a prompt leaves no room for a completion, a parameter is out of range, the model's logits are
                not finite, the policy's weights were changed since the last `update_weights`, or the call was
                abandoned.
        """
        params = sampling_of_prompts(prompts, sampling)
        sequences = self._sequences(prompts, params)
        records: dict[TokenSequence, Records] = {}
        with self._running(sequences, samples=True) as scheduler, self._weights.in_use():
            self._runner.begin()
            num_tokens = 0
            while scheduler.has_work:
                num_tokens += self._sample_step(scheduler, records)
                if on_step is not None:
                    on_step(num_tokens, len(records))
        completions = iter([self._completion(sequence, records[sequence]) for sequence in sequences])
        return [
            Rollout(prompt, tuple(next(completions) for _ in range(p.n)))
            for prompt, p in zip(prompts, params, strict=True)
        ]

    def stream(self, prompt: Prompt, sampling: SamplingParams) -> Iterator[str]:
        """Yield the text of one completion in pieces; the joined pieces are the completion's text.

        Raises:
            RolloutError: as `generate`, or `sampling.n` is not 1.
        """
        if sampling.n != 1:
            raise RolloutError(f"sampling.n is {sampling.n}, and must be 1 to stream one completion; use generate")
        [sequence] = self._sequences([prompt], sampling_of_prompts([prompt], sampling))
        sequence.detokenizer = sequence.detokenizer or Detokenizer(self._tokenizer, self._end_ids)
        return self._stream(sequence, sequence.detokenizer)

    def beam_search(self, prompts: Sequence[Prompt], params: BeamParams) -> list[BeamResult]:
        """Return the best completions of each prompt that a beam search finds, in the order of `prompts`.

        Raises:
            RolloutError: as `generate`, or the cache does not hold the beams of one prompt.
        """
        return self._searched(prompts, params, PromptBeams)

    def contrastive_search(self, prompts: Sequence[Prompt], params: ContrastiveParams) -> list[Rollout]:
        """Return one completion of each prompt by contrastive search, in the order of `prompts`; see `contrastive`.

        Raises:
            RolloutError: as `beam_search`.
        """
        return self._searched(prompts, params, ContrastiveSearch)

    @torch.inference_mode()
    def _searched(self, prompts: Sequence[Prompt], params: SearchParams, kind: type[Search]) -> list[Any]:
        """Return the results of a kind of search."""
        roots = self._sequences(prompts, [params.sampling(self._settings.max_running)] * len(prompts))
        results: list[Any] = []
        for chosen in in_batches(roots, params, self._settings.max_running, self._space.holds):
            with self._running(chosen, num_forks=params.num_forks) as scheduler, self._weights.in_use():
                self._runner.begin()
                engine = Computed(scheduler, self._runner.records, self.policy_version)
                searches = [kind(root, params, engine) for root in chosen]
                while scheduler.has_work:
                    step, outputs = self._next_step(scheduler)
                    hidden, [last] = self._runner.hidden(step, [last_rows(outputs)])
                    advance(searches, hidden, last, self._runner.logits, outputs)
            results += [search.result(self._completion) for search in searches]
        return results

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """Return the log-probs of given completions under the present weights, without sampling.

        All tokens of a completion are computed in one pass, and the full cache blocks of a prompt once for its group.

        Returns:
            [completion tokens] float32 for each completion, in order; at temperature 1, without truncation.

        Raises:
            RolloutError: a completion and its prompt are too long, or hold a token outside the vocabulary; otherwise
                as `generate`.
        """
        sequences = self._scored_sequences(rollouts)
        scored = [sequence for sequence in sequences if sequence.scored_ids]
        with self._running(scored) as scheduler, self._weights.in_use():
            self._runner.begin()
            while scheduler.has_work:
                self._score_step(scheduler)
        return [torch.tensor(sequence.raw_logprobs) for sequence in sequences]

    def update_weights(self, policy_version: int) -> None:
        """Take over the policy's present weights as version `policy_version`; drop what older weights computed.

        An engine that was closed is opened again.

        Raises:
            RolloutError: the version does not advance, or a call is in flight.
        """
        self._calls.require_idle()
        check_advances(policy_version, self.policy_version)
        if self._copy is not None:
            copy_whole(self._policy, self._copy)
        self._weights.refresh()
        self._space.forget_all()
        self._calls.open()
        self.policy_version = policy_version

    def rest(self) -> None:
        """Forget all prefixes, and free the cache, which the next call allocates again.

        A cache that takes little of a GPU's memory stays, since recorded steps read it where it lies.
        """
        self._calls.require_idle()
        self._weights.rest()
        self._speculation.rest()
        if cache_may_stay(self._runner.cache_bytes, self._runner.device):
            self._space.reset()
        else:
            self._space.free()

    def abandon(self) -> None:
        """Make the call in flight raise a RolloutError before its next step; may be called from any thread."""
        self._calls.abandon()

    def close(self) -> None:
        """Free the cache and the copies of weights; a call in flight is abandoned, and frees them at its end."""
        self._calls.close(self._release)

    def _release(self) -> None:
        """Free the cache and the copies of weights."""
        self._space.free()
        self._weights.release()
        self._speculation.rest()

    def metrics(self) -> dict[str, float]:
        """Return the counts of pre-empted sequences, of copies to the host and of accepted drafts,
        so far, and the seconds of the last rounding of weights.
        """
        swapped = {} if self._space.swap is None else self._space.swap.metrics()
        rounding = {} if self._weights.rounding is None else {"engine/rounding_s": self._weights.rounding_s}
        return {"engine/preempted": float(self.num_preempted)} | swapped | rounding | self._speculation.metrics()

    def _sequences(self, prompts: Sequence[Prompt], sampling: Sequence[SamplingParams]) -> list[TokenSequence]:
        """Return the sequences to sample, in order, checked."""
        self._calls.require_open()
        limits = self._limits(shorten="shorten the prompt or lower max_new_tokens")
        check_prompts(prompts, sampling, self._vocab_size, limits)
        measure_cache(self._policy, self._settings, prompts)
        sequences: list[TokenSequence] = []
        for prompt, params, keys in zip(prompts, sampling, completion_keys(prompts, sampling), strict=True):
            request = make_request(prompt, params, self._lm, self._tokenizer)
            sequences += [
                TokenSequence(
                    request, key, list(prompt.token_ids),
                    detokenizer=Detokenizer(self._tokenizer, self._end_ids) if params.stop else None,
                )
                for key in keys
            ]
        return sequences

    def _scored_sequences(self, rollouts: Sequence[Rollout]) -> list[TokenSequence]:
        """Return a sequence for each completion, in order, checked."""
        self._calls.require_open()
        check_completions(rollouts, self._vocab_size, self._limits(shorten="shorten the prompt or the completion"))
        measure_cache(self._policy, self._settings, [rollout.prompt for rollout in rollouts])
        return scored_sequences(rollouts)

    @property
    def _vocab_size(self) -> int:
        return int(self._lm.config.get_text_config().vocab_size)

    def _limits(self, *, shorten: str) -> list[LengthLimit]:
        return length_limits(self._lm, self._settings.cache_tokens, "rollout.cache_tokens", shorten=shorten)

    @property
    def _end_ids(self) -> frozenset[int]:
        """Tokens that end the model's completions."""
        return end_token_ids(self._lm, self._tokenizer, SamplingParams())

    @contextmanager
    def _running(
        self, sequences: Sequence[TokenSequence], *, num_forks: int = 1, samples: bool = False
    ) -> Iterator[Scheduler]:
        """Hold the engine for one call; yield a scheduler with the sequences, each of which may become `num_forks`.

        Raises:
            RolloutError: another call is in flight, the weights were changed, or the cache is too small.
        """
        with self._calls.call(self._release):
            scheduler = self._space.scheduler(str(self.policy_version).encode() if self._share else None)
            try:
                if self._weights.is_stale:
                    raise changed_weights(self.policy_version)
                self._space.reserve([*sequences] * num_forks)
                if samples:
                    self._speculation.begin(sequences)
                scheduler.add(sequences)
                yield scheduler
            except BaseException:
                self._space.reset()  # an interrupt may leave any count half done
                raise
            finally:
                self.num_preempted += scheduler.num_preempted
                self._speculation.end()
                self._sampler = self._runner.sampler()

    def _next_step(self, scheduler: Scheduler) -> tuple[Step, list[tuple[TokenSequence, slice]]]:
        """Choose the tokens of a step.

        Returns:
            The step; and the sequences that get logits, each with its rows among all logits of the step.
        """
        self._calls.require_wanted()
        if self._runner.device.type == "cpu":
            follow_free_cores()
        step = scheduler.schedule()
        outputs = scheduler.commit(step)
        self.num_computed += sum(work.count for work in step.work)
        return step, outputs

    @torch.inference_mode()
    def _sample_step(self, scheduler: Scheduler, records: dict[TokenSequence, Records]) -> int:
        """Compute one step and sample from it; put finished sequences into `records`, and return the tokens sampled."""
        self._speculation.draft(scheduler.running)
        step, outputs = self._next_step(scheduler)
        num_drafts = sum(sequence.num_drafts for sequence, _ in outputs)
        num_tokens, num_kept = sample_outputs(
            step, outputs, self._runner, self._sampler, self.policy_version, self._speculation.observe
        )
        self._speculation.record(step, num_drafts, num_kept)
        for sequence, _ in outputs:
            if sequence.finish_reason is not None:
                records[sequence] = self._runner.records(sequence)
                scheduler.finish(sequence)
        return num_tokens

    @torch.inference_mode()
    def _score_step(self, scheduler: Scheduler) -> None:
        """Compute one step of given tokens, and store their log-probs in their sequences."""
        step, outputs = self._next_step(scheduler)
        hidden, [targets] = self._runner.hidden(step, [scored_targets(outputs)])
        if outputs:
            record_logprobs(hidden, targets, self._runner.logits, outputs)
        for sequence, _ in outputs:
            if not sequence.num_pending:
                scheduler.finish(sequence)

    def _completion(self, sequence: TokenSequence, records: Records) -> Completion:
        if sequence.detokenizer is None:
            text = decode(self._tokenizer, sequence.sampled_ids, self._end_ids)
        else:  # `text_end` is an offset into this text; some tokenizers decode all tokens at once differently
            text = sequence.detokenizer.whole
        return replace(sequence.completion(text), routing=records.routing, kv_record=records.kv_record)

    def _stream(self, sequence: TokenSequence, detokenizer: Detokenizer) -> Iterator[str]:
        """Yield the text of `sequence` while it is sampled, holding back what may become a stop string."""
        held_back = max((len(stop) for stop in sequence.request.sampling.stop), default=1) - 1
        emitted = 0
        with self._running([sequence], samples=True) as scheduler:
            with self._weights.in_use():
                self._runner.begin()
            while scheduler.has_work:
                with self._weights.in_use():
                    self._sample_step(scheduler, {})
                certain = max(emitted, len(detokenizer.text) - held_back)
                if sequence.finish_reason is None and certain > emitted:
                    yield detokenizer.text[emitted:certain]
                    emitted = certain
        end = self._completion(sequence, Records()).text[emitted:]
        if end:
            yield end

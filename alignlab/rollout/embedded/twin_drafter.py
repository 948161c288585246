"""Drafts by layers that follow the policy's sequences with a cache of their own.

Each sequence has a twin, which has the sequence's tokens, and then the drafts. Drafts are drawn by the random numbers
of the policy's own draws, so that they agree where the probabilities are alike.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import isfinite

import torch
from torch import Tensor
from torch.nn.functional import pad

from alignlab.config.rollout import RolloutSettings
from alignlab.errors import RolloutError
from alignlab.rollout.embedded.cache_space import CacheSpace
from alignlab.rollout.embedded.places import Place
from alignlab.rollout.embedded.runner import Runner
from alignlab.rollout.embedded.scheduler import Scheduler, Step
from alignlab.rollout.embedded.sequence import TokenSequence


class TwinDrafter:
    """Samples drafts by twins.

    Args:
        runner: computes the twins' steps.
        settings: of the engine.
        num_drafts: tokens of a draft.
        vocab_size: logits of the policy.
    """

    is_free = False

    def __init__(self, runner: Runner, settings: RolloutSettings, num_drafts: int, vocab_size: int) -> None:
        self.num_drafts = num_drafts
        self._runner = runner
        self._settings = settings
        self._vocab_size = vocab_size
        # Twins of one prompt are not told to share, so that there is room for each alone.
        self._space = CacheSpace(runner, settings, runner.cache.block_size, share=False)
        self._sampler = runner.sampler()
        self._scheduler: Scheduler | None = None
        self._twins: dict[TokenSequence, TokenSequence] = {}

    def begin(self, sequences: Collection[TokenSequence]) -> None:
        """Make room for the twins of all sequences that run together.

        Raises:
            RolloutError: the memory does not suffice.
        """
        longest = sorted(sequences, key=lambda sequence: sequence.max_tokens)[-self._settings.max_running :]
        if not self._space.holds(longest):
            raise RolloutError(
                f"rollout.speculation needs a cache of its own for {len(longest)} sequences that run together, and "
                "there is no room; lower rollout.max_running, raise cache_tokens, or remove speculation"
            )
        self._space.reserve(list(sequences))
        self._scheduler = Scheduler(
            self._space.blocks, root=b"draft", max_running=self._settings.max_running,
            prefill_tokens=self._settings.prefill_tokens,
        )

    def end(self) -> None:
        """Free the twins."""
        self._space.blocks.reset()
        self._sampler, self._scheduler, self._twins = self._runner.sampler(), None, {}

    def rest(self) -> None:
        """Free the cache until the next call."""
        self._space.free()

    @torch.inference_mode()
    def propose(self, sequences: Sequence[TokenSequence]) -> list[list[int]]:
        """Return `num_drafts` tokens for each sequence, fewer where a twin's prompt took steps of its own."""
        twins = self._followed(sequences)
        for _ in range(self.num_drafts):
            self._draft_one(twins)
        return [twin.token_ids[len(twin.token_ids) - twin.num_drafts :] for twin in twins]

    def _followed(self, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
        """Return the twins of sequences, with their tokens; others give their blocks back."""
        assert self._scheduler is not None
        chosen = set(sequences)
        for sequence in [sequence for sequence in self._twins if sequence not in chosen]:
            self._scheduler.drop(self._twins.pop(sequence))
        twins = []
        for sequence in sequences:
            twin = self._twins.get(sequence)
            if twin is None:
                twin = self._twins[sequence] = self._twin_of(sequence)
                self._scheduler.add([twin])
            self._follow(twin, sequence)
            twins.append(twin)
        return twins

    def _twin_of(self, sequence: TokenSequence) -> TokenSequence:
        """Return a twin without tokens."""
        return TokenSequence(sequence.request, sequence.key, [])

    def _follow(self, twin: TokenSequence, sequence: TokenSequence) -> None:
        """Give a twin the tokens of its sequence."""
        follow(twin, sequence.token_ids)
        twin.logprobs = [0.0] * sequence.num_sampled

    def _hidden(self, step: Step, others: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Compute a step; see `Runner.hidden`."""
        return self._runner.hidden(step, others)

    def _draft_one(self, twins: Sequence[TokenSequence]) -> None:
        """Compute the tokens of twins that are not computed, as many as a step takes, and draft the next of each."""
        assert self._scheduler is not None
        if not any(twin.num_pending for twin in twins):
            return
        step = self._scheduler.schedule()
        outputs = [(twin, rows) for twin, rows in self._scheduler.commit(step) if not twin.num_pending]
        places = [Place(twin, len(twin.token_ids)) for twin, _ in outputs]
        inputs = self._sampler.inputs(places, self._vocab_size) if places else []
        last = torch.tensor([rows.stop - 1 for _, rows in outputs], dtype=torch.int64)
        hidden, (last, *inputs) = self._hidden(step, [last, *inputs])
        if places:
            self._add_drafts(hidden.index_select(0, last), places, inputs)

    def _add_drafts(self, hidden: Tensor, places: Sequence[Place], inputs: Sequence[Tensor]) -> None:
        """Draw a token after each final state [B, hidden size], and add it to its twin, where there is room for it.

        Args:
            places: of these tokens.
            inputs: of the sampler for these places, on the device.
        """
        logits = self._runner.logits(hidden)
        # Models pad one vocabulary to different sizes.
        logits = pad(logits, (0, self._vocab_size - logits.shape[1]), value=-torch.inf)
        for place, draw in zip(places, self._sampler.draw(logits, places, inputs), strict=True):
            twin = place.sequence
            if twin.num_drafts < twin.num_left - 1 and isfinite(draw.logprob):
                twin.add_drafts([draw.token])


def follow(twin: TokenSequence, token_ids: Sequence[int]) -> None:
    """Give a twin new tokens, without drafts; entries of tokens that it does not have are forgotten."""
    old = twin.token_ids
    common = len(old) - twin.num_drafts
    while common < min(len(token_ids), len(old)) and token_ids[common] == old[common]:
        common += 1
    twin.token_ids, twin.num_drafts = list(token_ids), 0
    twin.num_computed = min(twin.num_computed, common, len(token_ids) - 1)

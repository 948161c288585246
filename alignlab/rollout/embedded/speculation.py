"""Speculative decoding: drafted tokens are computed together with the token before them, and kept as far as they agree.

Each place of a completion has random numbers of its own, see `sampling`. So the token of a drafted place is drawn as it
would be without a draft, from the logits after the tokens before it, and the draft is kept while it is that token. The
completions are those of decoding token by token, and every log-prob is the same: a draft changes the speed alone.

A draft that is certain (q = 1) is kept with the probability p of its token, which is the min(1, p / q) of rejection
sampling, and the token that replaces it is distributed as its residual (Leviathan et al. 2022, arXiv:2211.17192; Chen
et al. 2023, arXiv:2302.01318). A draft model draws by the same random numbers, and so agrees the more often the nearer
its probabilities are (Daliri et al. 2024, arXiv:2408.07978).

Whether drafts pay depends on the device, the batch and the text: `payoff` measures it while generating.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from alignlab.config.rollout import MtpSettings, NgramSettings, RolloutSettings
from alignlab.errors import ConfigError
from alignlab.models.cache_spec import cache_specs
from alignlab.models.decoder import causal_lm
from alignlab.rollout.embedded.draft_model import make_draft_model
from alignlab.rollout.embedded.drafts import NgramDrafter
from alignlab.rollout.embedded.mtp_drafts import MtpDrafter, make_mtp_drafter
from alignlab.rollout.embedded.payoff import Payoff
from alignlab.rollout.embedded.runner import can_be_recorded
from alignlab.rollout.embedded.scheduler import Step
from alignlab.rollout.embedded.sequence import TokenSequence
from alignlab.rollout.embedded.state_cache import StateCache
from alignlab.rollout.embedded.weights import EngineWeights


class Drafter(Protocol):
    """A source of drafts.

    Attributes:
        num_drafts: tokens of a draft, at most.
        is_free: proposals cost next to nothing.
    """

    num_drafts: int
    is_free: bool

    def begin(self, sequences: Collection[TokenSequence]) -> None:
        """Prepare for a call with these sequences."""
        ...

    def propose(self, sequences: Sequence[TokenSequence]) -> list[list[int]]:
        """Return a draft for each sequence, whose tokens but the last are computed; empty for none."""
        ...

    def end(self) -> None:
        """Free what the call needed."""
        ...

    def rest(self) -> None:
        """Free what is kept between calls until the next one."""
        ...


class Speculation:
    """Drafts for the running sequences, and their acceptance.

    Args:
        drafter: source of the drafts.
        always: compute every draft, whatever it costs.

    Attributes:
        num_drafted, num_accepted: tokens, since the engine was made.
    """

    def __init__(self, drafter: Drafter, *, always: bool) -> None:
        self._drafter = drafter
        self._always = always
        self._payoff = Payoff(is_free=drafter.is_free)
        self._proposed: list[tuple[TokenSequence, list[int], int]] = []
        self.num_drafted = 0
        self.num_accepted = 0
        self._num_steps = 0
        self._num_draft_steps = 0
        self._start = 0.0

    def begin(self, sequences: Collection[TokenSequence]) -> None:
        """Prepare for a call with these sequences."""
        self._drafter.begin(sequences)

    def end(self) -> None:
        """Free what the call needed."""
        self._proposed = []
        self._drafter.end()

    def rest(self) -> None:
        """Free what is kept between calls until the next one."""
        self._drafter.rest()

    def draft(self, running: Sequence[TokenSequence]) -> None:
        """Add drafts to the sequences that are decoded next, where they pay."""
        start = self._start = perf_counter()
        self._proposed = []
        decoded = [s for s in running if s.num_pending == 1 and s.num_sampled and s.num_left > 1]
        if not decoded or not (self._always or self._payoff.asks()):
            return
        proposals = self._drafter.propose(decoded)
        self._start = perf_counter()
        self._payoff.record_proposals(self._start - start)
        lengths = [len(p) for p in proposals] if self._always else self._payoff.lengths(decoded, proposals)
        for sequence, proposal, length in zip(decoded, proposals, lengths, strict=True):
            self._proposed.append((sequence, proposal, len(sequence.token_ids)))
            sequence.add_drafts(proposal[: min(length, sequence.num_left - 1)])

    def observe(self, outputs: Sequence[tuple[TokenSequence, slice]], hidden: Tensor) -> None:
        """Take note of the final states of a step [M,D], before its tokens are sampled.

        Args:
            outputs: each sequence with its rows of `hidden`.
        """
        if isinstance(self._drafter, MtpDrafter):
            self._drafter.observe(outputs, hidden)

    def record(self, step: Step, num_drafted: int, num_accepted: int) -> None:
        """Take note of a step whose tokens are sampled."""
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        for sequence, proposal, end in self._proposed:
            self._payoff.record_tokens(sequence, proposal, sequence.token_ids[end:])
        if all(work.start >= work.sequence.num_prompt for work in step.work):
            self._num_steps += 1
            self._num_draft_steps += num_drafted > 0
            self._payoff.record_step(sum(work.count for work in step.work), perf_counter() - self._start)

    def metrics(self) -> dict[str, float]:
        """Return the fraction of drafted tokens that were kept, and of decoding steps with drafts; so far."""
        return {
            "engine/draft_acceptance": self.num_accepted / max(1, self.num_drafted),
            "engine/draft_steps_frac": self._num_draft_steps / max(1, self._num_steps),
        }


class NoSpeculation(Speculation):
    """Decoding token by token."""

    def __init__(self) -> None:
        super().__init__(NgramDrafter(0, 1, 1), always=False)

    def draft(self, running: Sequence[TokenSequence]) -> None:
        """Add nothing."""

    def record(self, step: Step, num_drafted: int, num_accepted: int) -> None:
        """Count nothing."""

    def metrics(self) -> dict[str, float]:
        """Return nothing."""
        return {}


def make_speculation(
    settings: RolloutSettings, model: nn.Module, tokenizer: PreTrainedTokenizerBase, vocab_size: int,
    weights: EngineWeights,
) -> Speculation:
    """Return the speculation that the settings ask for.

    Args:
        vocab_size: logits of the policy.
        weights: what the policy runs on.

    Raises:
        ConfigError: the policy keeps states that cannot be taken back, steps are replayed, the draft model does not fit
            the policy, or the policy has no layer for multi-token prediction.
    """
    chosen = settings.speculation
    if chosen is None:
        return NoSpeculation()
    if StateCache(cache_specs(model), torch.float32):
        raise ConfigError(
            f"rollout.speculation is {chosen.type}, and must be null for a model with recurrent layers, whose states "
            "cannot be taken back when a draft is not kept; remove it"
        )
    if settings.cuda_graphs and can_be_recorded(model, causal_lm(model).device):
        raise ConfigError(
            f"rollout.speculation is {chosen.type}, and rollout.cuda_graphs must then be false on a GPU: steps with "
            "drafts have too many shapes to be recorded; use cuda_graphs: false, or remove it"
        )
    drafter: Drafter
    if isinstance(chosen, NgramSettings):
        drafter = NgramDrafter(chosen.num_drafts, chosen.min_match, chosen.max_match)
    elif isinstance(chosen, MtpSettings):
        drafter = make_mtp_drafter(chosen, settings, model, weights, vocab_size)
    else:
        drafter = make_draft_model(chosen, settings, model, tokenizer, vocab_size)
    return Speculation(drafter, always=chosen.always)

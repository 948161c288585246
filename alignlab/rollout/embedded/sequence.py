"""The state of one completion while the engine samples or scores it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignlab.models.kv_approximation.eviction_record import Evictions
from alignlab.rollout.decoding_rules import banned_phrases
from alignlab.rollout.detokenizer import Detokenizer
from alignlab.rollout.embedded.block_pools import Tables
from alignlab.rollout.grammars import Grammar, GrammarState, grammar_of
from alignlab.rollout.requests import end_token_ids
from alignlab.types import Completion, FinishReason, Prompt, Rollout, SamplingParams


@dataclass(eq=False)
class Request:
    """A prompt with its sampling parameters; its `sampling.n` sequences share the cache blocks of the prompt.

    Attributes:
        end_token_ids: tokens that end a completion; none may be sampled before `sampling.min_new_tokens`.
        banned_phrases: tokens of `sampling.banned_words`; the last of a phrase must not follow the others.
        grammar: what every completion must match; None for any text.
        kept_of_prompt: places of the tokens that stayed at the prompt's end, by layer, where the cache has a budget:
            what its first sequence chose, which the others take over.
    """

    prompt: Prompt
    sampling: SamplingParams
    end_token_ids: frozenset[int]
    banned_phrases: tuple[tuple[int, ...], ...] = ()
    grammar: Grammar | None = None
    kept_of_prompt: dict[int, Tensor] | None = None

    @cached_property
    def has_controls(self) -> bool:
        """True if logits are changed by more than the repetition penalty and banned tokens."""
        sampling = self.sampling
        changes = (sampling.presence_penalty, sampling.frequency_penalty, sampling.logit_bias, sampling.forced_tokens)
        return self.grammar is not None or any(changes)


def make_request(
    prompt: Prompt, sampling: SamplingParams, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Request:
    """Return the request of completions of a prompt.

    Raises:
        RolloutError: a banned word has no tokens, or the grammar cannot be kept.
    """
    ends = end_token_ids(lm, tokenizer, sampling)
    grammar = grammar_of(sampling, tokenizer, lm.config.get_text_config().vocab_size, ends)
    return Request(prompt, sampling, ends, banned_phrases(sampling.banned_words, tokenizer), grammar)


@dataclass(eq=False)
class TokenSequence:
    """A prompt with the tokens that follow it: sampled so far, or given to be scored.

    Attributes:
        key: key of the completion's random numbers.
        token_ids: the tokens to compute: the prompt, then the sampled tokens, or the given ones except the last.
        reads_prompt: the states of all tokens are needed, as if each had logits.
        num_drafts: last tokens of `token_ids` that are guesses, for the time of one step.
        scored_ids: given tokens after the prompt, whose log-probs are computed; empty where tokens are sampled.
        num_computed: leading tokens whose entries are in the cache, or on the host, see `swapping`; 0 again after a
            pre-emption that kept nothing.
        tables: cache blocks, in order, by the window of the layers that they belong to; see `block_pools`.
        state: slot of what recurrent layers keep of it, see `state_slots`; None before its first token.
        digests: digests of the leading full blocks that were looked up or published.
        followers: sequences of the same request that wait until this one has computed the prompt.
        logprobs: log-prob of each sampled token under the distribution sampled from.
        raw_logprobs: log-prob of each sampled or scored token under the model's own distribution.
        text_end: where a stop string begins in the text.
        grammar: the completion's place in the grammar of its request.
        num_dropped: tokens that a budget has dropped from its tables.
        stayed, received: positions of the tokens that stayed [K, tokens] at the last boundary, and the attention that
            they had received; by layer, see `heavy_hitters`.
        evictions: what stayed at each boundary; a sequence that is computed again drops the same tokens.
    """

    request: Request
    key: int
    token_ids: list[int]
    scored_ids: tuple[int, ...] = ()
    reads_prompt: bool = False
    num_drafts: int = 0
    num_computed: int = 0
    tables: Tables = field(default_factory=dict)
    state: int | None = None
    digests: list[bytes] = field(default_factory=list)
    followers: list[TokenSequence] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    detokenizer: Detokenizer | None = None
    text_end: int | None = None
    grammar: GrammarState | None = None
    num_dropped: int = 0
    stayed: dict[int, Tensor] = field(default_factory=dict)
    received: dict[int, Tensor] = field(default_factory=dict)
    evictions: Evictions = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.request.grammar is not None:
            self.grammar = self.request.grammar.begin()

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt.token_ids)

    @property
    def num_sampled(self) -> int:
        return len(self.logprobs)

    @property
    def num_pending(self) -> int:
        """Tokens that are not computed yet."""
        return len(self.token_ids) - self.num_computed

    @property
    def max_tokens(self) -> int:
        """Most tokens whose entries the cache will hold."""
        return len(self.token_ids) if self.scored_ids else self.num_prompt + self.request.sampling.max_new_tokens

    @property
    def first_logits(self) -> int:
        """Position of the first token after which logits are needed."""
        if self.reads_prompt:
            return 0
        return self.num_prompt - 1 if self.scored_ids else len(self.token_ids) - 1 - self.num_drafts

    @property
    def num_left(self) -> int:
        """Most tokens that are still to be sampled."""
        return self.request.sampling.max_new_tokens - self.num_sampled

    def add_drafts(self, drafts: Sequence[int]) -> None:
        """Add guesses of the next tokens behind the others, up to the first one that cannot be kept.

        That is one that the grammar refuses, or after which it allows nothing: it must not end the call, since another
        token may be sampled in its place.
        """
        for draft in drafts:
            if self.grammar is not None and not self.grammar.leads_on([*self.sampled_ids, draft]):
                return
            self.token_ids.append(draft)
            self.num_drafts += 1

    def take_drafts(self) -> list[int]:
        """Remove the guesses, and return them."""
        end = len(self.token_ids) - self.num_drafts
        drafts, self.token_ids[end:], self.num_drafts = self.token_ids[end:], [], 0
        return drafts

    @property
    def sampled_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    def append(self, token: int, logprob: float, raw_logprob: float, version: int) -> None:
        """Add a sampled token, and set `finish_reason` if the token ends the completion."""
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        self.raw_logprobs.append(raw_logprob)
        self.versions.append(version)
        if token in self.request.end_token_ids or self._stop_string_ends():
            self.finish_reason = "stop"
        elif self.num_sampled == self.request.sampling.max_new_tokens:
            self.finish_reason = "length"

    def _stop_string_ends(self) -> bool:
        """Return True if the newest token completed a stop string."""
        if self.detokenizer is None:
            return False
        old_length = len(self.detokenizer.text)
        self.detokenizer.push(self.token_ids[-1])
        sampling = self.request.sampling
        if self.num_sampled < sampling.min_new_tokens:
            return False
        text = self.detokenizer.text
        # A stop string may begin in the old text, but must end in the new.
        starts = [text.find(stop, max(0, old_length - len(stop) + 1)) for stop in sampling.stop]
        self.text_end = min((start for start in starts if start >= 0), default=None)
        return self.text_end is not None

    def completion(self, text: str) -> Completion:
        """Return the finished completion; `text` is the decoded text, which a stop string cuts here."""
        assert self.finish_reason is not None
        return Completion(
            token_ids=tuple(self.sampled_ids), text=text[: self.text_end], logprobs=tuple(self.logprobs),
            raw_logprobs=tuple(self.raw_logprobs), finish_reason=self.finish_reason,
            policy_versions=tuple(self.versions),
        )


def scored_sequences(rollouts: Sequence[Rollout]) -> list[TokenSequence]:
    """Return a sequence for each completion, whose log-probs are computed."""
    sequences = []
    for rollout in rollouts:
        request = Request(rollout.prompt, SamplingParams(), frozenset())
        for completion in rollout.completions:
            token_ids = [*rollout.prompt.token_ids, *completion.token_ids[:-1]]
            sequences.append(TokenSequence(request, 0, token_ids, scored_ids=completion.token_ids))
    return sequences

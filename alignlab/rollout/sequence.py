"""One completion while it is being generated."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from alignlab.rollout.detokenizer import Detokenizer
from alignlab.types import Completion, FinishReason, Prompt, SamplingParams


@dataclass(eq=False)
class Request:
    """A prompt and how to continue it; its `sampling.n` sequences share the prompt's part of the cache.

    Attributes:
        end_token_ids: tokens that end a completion; none may be sampled before `sampling.min_new_tokens`.
    """

    prompt: Prompt
    sampling: SamplingParams
    end_token_ids: frozenset[int]


@dataclass(eq=False)
class TokenSequence:
    """A prompt and what was sampled after it so far.

    Attributes:
        key: of its random numbers.
        token_ids: prompt, then sampled tokens.
        num_computed: leading tokens whose keys and values are in the cache; 0 again after a pre-emption.
        blocks: cache blocks, in order.
        digests: of the leading full blocks that were looked up or published.
        followers: sequences of the same request that wait for this one to compute the prompt.
        text_end: where a stop string begins in the text.
    """

    request: Request
    key: int
    token_ids: list[int]
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    followers: list[TokenSequence] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    detokenizer: Detokenizer | None = None
    text_end: int | None = None

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt.token_ids)

    @property
    def num_sampled(self) -> int:
        return len(self.logprobs)

    @property
    def num_pending(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.token_ids) - self.num_computed

    @property
    def sampled_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    @property
    def penalised_ids(self) -> Collection[int]:
        """Distinct tokens that the repetition penalty applies to."""
        return set(self.token_ids) if self.request.sampling.repetition_penalty != 1 else ()

    @property
    def banned_ids(self) -> Collection[int]:
        """Tokens that must not be sampled next, because the completion would be too short."""
        return self.request.end_token_ids if self.num_sampled < self.request.sampling.min_new_tokens else ()

    def append(self, token: int, logprob: float, raw_logprob: float, version: int) -> None:
        """Take a sampled token, and finish where it ends the completion."""
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        self.raw_logprobs.append(raw_logprob)
        self.versions.append(version)
        if token in self.request.end_token_ids or self._stop_string_ends():
            self.finish_reason = "stop"
        elif self.num_sampled == self.request.sampling.max_new_tokens:
            self.finish_reason = "length"

    def _stop_string_ends(self) -> bool:
        """Whether the newest token completed a stop string."""
        if self.detokenizer is None:
            return False
        known = len(self.detokenizer.text)
        self.detokenizer.push(self.token_ids[-1])
        sampling = self.request.sampling
        if self.num_sampled < sampling.min_new_tokens:
            return False
        text = self.detokenizer.text
        found = [text.find(stop, max(0, known - len(stop) + 1)) for stop in sampling.stop]
        self.text_end = min((start for start in found if start >= 0), default=None)
        return self.text_end is not None

    def completion(self, text: str) -> Completion:
        """What is handed out; `text` is all of it, decoded."""
        assert self.finish_reason is not None
        return Completion(
            token_ids=tuple(self.sampled_ids), text=text[: self.text_end], logprobs=tuple(self.logprobs),
            raw_logprobs=tuple(self.raw_logprobs), finish_reason=self.finish_reason,
            policy_versions=tuple(self.versions),
        )

"""The place of a token that is to be sampled, and what its request asks of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alignlab.rollout.embedded.controls import packed_bits
from alignlab.rollout.embedded.sequence import TokenSequence
from alignlab.types import SamplingParams


def places_of(sequence: TokenSequence) -> list[Place]:
    """Return the places that are sampled next: after each token from the last one that is certain on."""
    end = len(sequence.token_ids)
    return [Place(sequence, end - sequence.num_drafts + number) for number in range(1 + sequence.num_drafts)]


class Place(NamedTuple):
    """The place after the first `end` tokens of a sequence."""

    sequence: TokenSequence
    end: int

    @property
    def sampling(self) -> SamplingParams:
        return self.sequence.request.sampling

    @property
    def number(self) -> int:
        """Number of the token in its completion."""
        return self.end - self.sequence.num_prompt

    @property
    def is_drafted(self) -> bool:
        """True if tokens before the place are drafts."""
        return self.end > len(self.sequence.token_ids) - self.sequence.num_drafts

    @property
    def forced(self) -> int | None:
        """The token that must stand here; None if it is sampled."""
        return dict(self.sampling.forced_tokens).get(self.number) if self.sampling.forced_tokens else None

    @property
    def penalised_ids(self) -> Collection[int]:
        """Distinct tokens that the repetition penalty applies to."""
        return set(self.sequence.token_ids[: self.end]) if self.sampling.repetition_penalty != 1 else ()

    @property
    def banned_ids(self) -> Collection[int]:
        """Tokens that must not stand here: end tokens of a completion that is too short, and what the request bans."""
        request, sampling = self.sequence.request, self.sampling
        ends = request.end_token_ids if self.number < sampling.min_new_tokens else frozenset()
        if not (sampling.banned_token_ids or request.banned_phrases):
            return ends if self.forced is None else ()
        if self.forced is not None:
            return ()
        return ends.union(sampling.banned_token_ids, self._ends_of_phrases())

    @property
    def charges(self) -> Mapping[int, float]:
        """The number added to the logit of each of the completion's tokens."""
        presence, frequency = self.sampling.presence_penalty, self.sampling.frequency_penalty
        if presence == frequency == 0:
            return {}
        counts = Counter(self.sequence.token_ids[self.sequence.num_prompt : self.end])
        return {token: -presence - frequency * count for token, count in counts.items()}

    def allowed(self, vocab_size: int) -> NDArray[np.uint8] | None:
        """Return packed bits of the tokens that may stand here; None if all may.

        Raises:
            RolloutError: the grammar leaves none.
        """
        if self.sequence.grammar is not None:
            return self.sequence.grammar.allowed(self.sequence.token_ids[self.sequence.num_prompt : self.end])
        forced = self.forced
        return None if forced is None else packed_bits([forced], vocab_size)

    def _ends_of_phrases(self) -> Collection[int]:
        """Return the last tokens of banned phrases whose other tokens the completion ends with."""
        ids = self.sequence.token_ids
        ends = set()
        for phrase in self.sequence.request.banned_phrases:
            start = self.end - len(phrase) + 1
            if start >= self.sequence.num_prompt and tuple(ids[start : self.end]) == phrase[:-1]:
                ends.add(phrase[-1])
        return ends

"""Drafts of the next tokens without a model: what followed the same few tokens before, in the prompt or its group."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from alignlab.rollout.embedded.sequence import Request, TokenSequence

_Continuation = tuple[list[int], int]


class NgramIndex:
    """The latest place of each n-gram of some texts, by which a text that ends with one is continued.

    Args:
        shortest, longest: tokens of the n-grams.

    Reference: Saxena (2023), "Prompt Lookup Decoding"; suffixes of several texts as in Hu et al. (2024),
    arXiv:2411.04975.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        self._places: dict[tuple[int, ...], _Continuation] = {}

    def add(self, token_ids: list[int], start: int, end: int) -> None:
        """Add the n-grams that the tokens from `start` to `end` follow; the list may grow later."""
        for position in range(start, end):
            for length in self._lengths:
                if length <= position:
                    self._places[tuple(token_ids[position - length : position])] = (token_ids, position)

    def continued(self, token_ids: Sequence[int], most: int) -> list[int]:
        """Return at most `most` tokens that followed the longest n-gram which the tokens end with; none without one."""
        for length in self._lengths:
            if length <= len(token_ids):
                found = self._places.get(tuple(token_ids[-length:]))
                if found is not None:
                    text, position = found
                    return text[position : position + most]
        return []


class NgramDrafter:
    """Drafts from the prompt, the sequence's own text and those of its group.

    Args:
        num_drafts: tokens of a draft, at most.
        shortest, longest: tokens that must have stood before, see `NgramIndex`.
    """

    is_free = True

    def __init__(self, num_drafts: int, shortest: int, longest: int) -> None:
        self.num_drafts = num_drafts
        self._bounds = (shortest, longest)
        self._indices: dict[Request, NgramIndex] = {}
        self._texts: dict[TokenSequence, list[int]] = {}

    def begin(self, sequences: Collection[TokenSequence]) -> None:
        """Forget the texts of the last call."""
        self._indices, self._texts = {}, {}

    def propose(self, sequences: Sequence[TokenSequence]) -> list[list[int]]:
        """Return a draft for each sequence, empty where nothing is known."""
        for sequence in sequences:
            self._learn(sequence)
        return [
            self._indices[sequence.request].continued(sequence.token_ids[-self._bounds[1] :], self.num_drafts)
            for sequence in sequences
        ]

    def end(self) -> None:
        """Free what the call needed."""
        self._indices, self._texts = {}, {}

    def rest(self) -> None:
        """Free what is kept between calls: nothing."""

    def _learn(self, sequence: TokenSequence) -> None:
        """Add the tokens of a sequence that came since the last time; a prompt is added once for its group."""
        index = self._indices.get(sequence.request)
        start = 0 if index is None else sequence.num_prompt
        if index is None:
            index = self._indices[sequence.request] = NgramIndex(*self._bounds)
        text = self._texts.setdefault(sequence, sequence.token_ids[:start])
        known = len(text)
        text += sequence.token_ids[known:]
        index.add(text, known, len(text))

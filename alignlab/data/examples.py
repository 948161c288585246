"""Supervised examples: token ids, and which of them are taught."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One sequence to learn from.

    Attributes:
        token_ids: the whole sequence, at least one token.
        completion_mask: True on the tokens that are taught. The first token has nothing before it to be predicted
            from, so it is never taught.
    """

    token_ids: tuple[int, ...]
    completion_mask: tuple[bool, ...]

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.completion_mask) >= 1
        assert not self.completion_mask[0], "the first token of a sequence has no predecessor"

"""Beam search over the likeliest continuations: its parameters, its scores, and the choice of a step's beams.

Shapes: K beams of a group, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Generic, NamedTuple, TypeVar

import torch

from alignlab.errors import RolloutError
from alignlab.rollout.embedded.search import Row
from alignlab.types import Rollout, SamplingParams

T = TypeVar("T")


@dataclass(frozen=True)
class BeamParams:
    """Parameters of a beam search.

    Attributes:
        num_beams: continuations that are followed at once, over all groups, >= 1.
        num_best: completions that are returned of each prompt, from 1 to `num_beams`.
        length_penalty: exponent of the length that a completion's log-prob is divided by: 0 prefers short ones, 1 is
            the mean a token.
        num_groups: groups of beams that are kept apart; must divide `num_beams`.
        diversity: nats that a token costs a group for each beam of the groups before it which took the token in the
            same step; > 0 with several groups.
        max_new_tokens: largest number of tokens of a completion, >= 1.
        stop_token_ids: tokens that end a completion, in addition to the model's end tokens.
    """

    num_beams: int = 4
    num_best: int = 1
    length_penalty: float = 1.0
    num_groups: int = 1
    diversity: float = 0.0
    max_new_tokens: int = 64
    stop_token_ids: tuple[int, ...] = ()

    reads_prompt = False

    @property
    def num_forks(self) -> int:
        """Continuations of a prompt that are followed at once."""
        return self.num_beams

    @property
    def group_size(self) -> int:
        """Beams of a group."""
        return self.num_beams // self.num_groups

    def sampling(self, max_running: int) -> SamplingParams:
        """Return the limits of completions as an engine takes them; nothing is sampled.

        Raises:
            RolloutError: a parameter is out of range or contradicts another, with the rule, the value and the fix.
        """
        beams, groups = self.num_beams, self.num_groups
        rules = {
            "num_beams": (1 <= beams <= max_running, f"be from 1 to rollout.max_running ({max_running})"),
            "num_best": (1 <= self.num_best <= beams, f"be from 1 to num_beams ({beams})"),
            "num_groups": (groups >= 1 and beams % groups == 0, f"divide num_beams ({beams})"),
            "diversity": (
                self.diversity > 0 and isfinite(self.diversity) if groups > 1 else self.diversity == 0,
                "be over 0 and finite with several groups, which are equal without it" if groups > 1
                else "be 0 with one group, which has no other to differ from",
            ),
            "length_penalty": (isfinite(self.length_penalty), "be finite"),
            "max_new_tokens": (self.max_new_tokens >= 1, "be at least 1"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise RolloutError(f"beams.{name} is {getattr(self, name)}, and must {rule}")
        return SamplingParams(
            temperature=0.0, max_new_tokens=self.max_new_tokens, stop_token_ids=self.stop_token_ids, seed=0
        )


@dataclass(frozen=True)
class BeamResult:
    """The best completions of a prompt, the best one first.

    Attributes:
        rollout: the prompt and its completions; both log-probs of a token are the model's own, because nothing was
            sampled.
        scores: log-prob of each completion, divided by its length to the power of `length_penalty`.
    """

    rollout: Rollout
    scores: tuple[float, ...]


class Continuation(NamedTuple):
    """A beam with one more token.

    Attributes:
        beam: index of the beam in its group.
        logprob: of all tokens, and of the new one alone, nats.
    """

    beam: int
    token: int
    logprob: float
    token_logprob: float


def continuations(
    rows: Sequence[Row], totals: Sequence[float], taken: Sequence[int], *, diversity: float, count: int
) -> list[Continuation]:
    """Return the `count` best continuations of a group's beams, the best one first.

        value(beam, token) = total(beam) + log p(token | beam) - diversity * times(token, taken)

    Args:
        rows: the likeliest tokens after each beam, as many of each: all, or `likeliest_needed`.
        totals: log-prob of each beam.
        taken: tokens of this step of the groups before, one for each of their beams.
        diversity: nats a token of `taken` costs.
        count: at most; tokens that cannot follow are left out.

    Reference: Vijayakumar et al. (2016), arXiv:1610.02424, Eq. 5, with Hamming diversity. The cost of earlier steps is
    not kept: a beam's total is the model's log-prob.
    """
    logprobs = torch.tensor([row.logprobs for row in rows])
    values = logprobs + torch.tensor(totals)[:, None]
    times = Counter(taken)
    priced = values - diversity * torch.tensor([[times[token] for token in row.tokens] for row in rows])
    found = []
    for place in priced.flatten().topk(min(count, values.numel())).indices.tolist():
        beam, column = divmod(place, values.shape[1])
        if priced[beam, column] > -inf:
            numbers = float(values[beam, column]), float(logprobs[beam, column])
            found.append(Continuation(beam, rows[beam].tokens[column], *numbers))
    return found


def likeliest_needed(count: int, num_taken: int) -> int:
    """Return how many of a beam's likeliest tokens hold all of it that can be among the `count` best continuations.

    Those which `num_taken` tokens at most, whose value is lowered, may stand before.
    """
    return count + num_taken


@dataclass
class Finished(Generic[T]):
    """The best completions of a group that have ended.

    Attributes:
        items: (score, completion), the best one first.
    """

    size: int
    length_penalty: float
    items: list[tuple[float, T]] = field(default_factory=list)

    def score(self, logprob: float, length: int) -> float:
        """Return the score of a completion: its log-prob over its length to the power of the penalty."""
        return logprob / length**self.length_penalty

    def takes(self, score: float) -> bool:
        """Return whether a completion of this score is among the best so far."""
        return len(self.items) < self.size or score > self.items[-1][0]

    def add(self, score: float, completion: T) -> None:
        """Keep a completion, if it is among the best."""
        if self.takes(score):
            self.items = sorted([*self.items, (score, completion)], key=lambda item: -item[0])[: self.size]

    def is_final(self, best_total: float, length: int, max_length: int) -> bool:
        """Return whether no beam can become one of the best.

        Args:
            best_total: log-prob of the best beam, which more tokens only lower.
            length: of the beams; each will have one token more at least.
            max_length: tokens of the longest completion.
        """
        if len(self.items) < self.size:
            return False
        longest = max_length if self.length_penalty > 0 else length + 1
        return not self.takes(self.score(best_total, longest))


def split(
    found: Sequence[Continuation], group_size: int, end_token_ids: Collection[int], *, is_last: bool
) -> tuple[list[Continuation], list[Continuation]]:
    """Return the continuations that go on, at most `group_size`, and those that end, among the best `group_size`.

    Args:
        found: the best continuations, the best one first.
        is_last: no token may follow, so that all end.
    """
    ends = [c for c in found[:group_size] if is_last or c.token in end_token_ids]
    if is_last:
        return [], ends
    return [c for c in found if c.token not in end_token_ids][:group_size], ends

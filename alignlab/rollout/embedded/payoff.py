"""The gain of drafts: the cost of a step by its number of tokens, and how often a sequence's drafts are right."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from statistics import fmean, median
from weakref import WeakKeyDictionary

from alignlab.rollout.embedded.sequence import TokenSequence

_REMEMBERED = 8
"""Latest steps of a size whose median is its cost: a neighbour on the machine makes some of them slow."""
_NEEDED = 3
"""Steps of a size until its cost is known."""
_FIRST_AGREEMENT = 0.5
_RATE = 0.15
"""Weight of each new token in the agreement of a sequence."""
_REVIEW_STEPS = 128
_REVIEWED_STEPS = 4
"""Where proposals cost a model's time and do not pay, they are made for a few steps out of so many."""


class StepCosts:
    """Seconds of a step, as a line over the tokens that it computes, through the medians of sizes that came."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))

    def add(self, num_tokens: int, seconds: float) -> None:
        """Take note of a step."""
        self._seconds[_size(num_tokens)].append(seconds)

    def knows(self, num_tokens: int) -> bool:
        """Return whether the cost of steps of this size was measured."""
        return len(self._seconds[_size(num_tokens)]) >= _NEEDED

    def line(self) -> tuple[float, float] | None:
        """Return the seconds of a step without tokens, and of each token more; None before two sizes are known."""
        points = [(float(size), median(s)) for size, s in self._seconds.items() if len(s) >= _NEEDED]
        if len(points) < 2:
            return None
        mean_x, mean_y = fmean(x for x, _ in points), fmean(y for _, y in points)
        slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
        return mean_y - slope * mean_x, slope


class Payoff:
    """Chooses the length of each sequence's draft.

    A sequence whose tokens agree with their drafts at the rate a gains the i-th token of a draft with the probability
    a ** i. The token is worth the seconds that a token takes without drafts, and costs those of one token more in a
    step. So a draft is as long as a ** i is over the ratio of both. Agreement is known of drafts that were not computed
    too, since they are compared with what was sampled instead.

    Args:
        is_free: proposals cost next to nothing, and are made at every step.
    """

    def __init__(self, *, is_free: bool) -> None:
        self._is_free = is_free
        self._costs = StepCosts()
        self._proposal_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._agreement: WeakKeyDictionary[TokenSequence, float] = WeakKeyDictionary()
        self._num_steps = 0
        self._paid = True

    def asks(self) -> bool:
        """Return whether the next step is to have proposals."""
        self._num_steps += 1
        return self._is_free or self._paid or self._num_steps % _REVIEW_STEPS < _REVIEWED_STEPS

    def lengths(self, sequences: Sequence[TokenSequence], proposals: Sequence[Sequence[int]]) -> list[int]:
        """Return how many tokens of each sequence's proposal to compute."""
        full, none = [len(proposal) for proposal in proposals], [0] * len(proposals)
        line = self._costs.line()
        num_rows = len(sequences)
        if not self._costs.knows(num_rows) and self._num_steps % 2:
            return none  # measured without drafts first, then with them
        if line is None:
            return full
        base, slope = line
        worth = max(base + slope * num_rows, 0.0) / num_rows
        gain, lengths = -median(self._proposal_s or [0.0]), []
        for sequence, most in zip(sequences, full, strict=True):
            agreement = self._agreement.get(sequence, _FIRST_AGREEMENT)
            chances = [agreement**i for i in range(1, most + 1) if agreement**i * worth > slope]
            lengths.append(len(chances))
            gain += sum(chance * worth - slope for chance in chances)
        self._paid = gain > 0
        return lengths if self._paid else none

    def record_proposals(self, seconds: float) -> None:
        """Take note of the time that proposals took."""
        self._proposal_s.append(seconds)

    def record_step(self, num_tokens: int, seconds: float) -> None:
        """Take note of a decoding step that computed so many tokens, without the time of its proposals."""
        self._costs.add(num_tokens, seconds)

    def record_tokens(self, sequence: TokenSequence, proposal: Sequence[int], sampled: Sequence[int]) -> None:
        """Compare what was proposed with what was sampled."""
        agreement = self._agreement.get(sequence, _FIRST_AGREEMENT)
        for guess, token in zip(proposal, sampled, strict=False):
            agreement += _RATE * ((guess == token) - agreement)
            if guess != token:
                break
        self._agreement[sequence] = agreement


def _size(num_tokens: int) -> int:
    """Return the size of a step: its tokens, rounded down to steps of an eighth or less."""
    unit = 1 << max(0, num_tokens.bit_length() - 4)
    return num_tokens // unit * unit

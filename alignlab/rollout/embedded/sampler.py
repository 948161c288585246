"""The step from logits to the next token of each sequence, or to the log-probs of given tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from alignlab.errors import RolloutError
from alignlab.rollout.embedded.controls import Controls
from alignlab.rollout.embedded.places import Place
from alignlab.rollout.embedded.sampling import Sampled, SamplingTable, sample, token_logprobs
from alignlab.rollout.embedded.sequence import TokenSequence

_NUM_COLUMNS = 2
"""Tensors of `SamplingTable.columns`."""
_ROWS = 256
"""Rows whose logits are computed together when given tokens are scored: those of a whole step may not fit in memory."""


class Draw(NamedTuple):
    """A sampled token, with its log-prob under the distribution sampled from and under the model's own."""

    token: int
    logprob: float
    raw_logprob: float


class Sampler:
    """Samples for a batch of sequences that mostly stays the same from step to step.

    The parameters of a batch are moved to the device once, and used until the batch changes. What a step needs besides
    is given out as host tensors, so that it travels with the step's tokens in one copy.

    Args:
        draw: what samples, of the signature of `sampling.sample`.
    """

    def __init__(self, draw: Callable[..., Sampled] = sample) -> None:
        self._draw = draw
        self._sequences: list[TokenSequence] = []
        self._table: SamplingTable | None = None
        self._has_columns = True

    def inputs(self, places: Sequence[Place], vocab_size: int) -> list[Tensor]:
        """Return the host tensors that `draw` takes on the device for these places."""
        tensors = [
            torch.tensor([place.number for place in places]),
            _pairs([place.penalised_ids for place in places]),
            _pairs([place.banned_ids for place in places]),
        ]
        sequences = [place.sequence for place in places]
        self._has_columns = self._table is None or self._sequences != sequences
        if self._has_columns:
            params, keys = [s.request.sampling for s in sequences], [s.key for s in sequences]
            tensors += SamplingTable.columns(params, keys, vocab_size)
        controls = _controls(places, vocab_size)
        return tensors if controls is None else [*tensors, *controls.tensors()]

    def draw(self, logits: Tensor, places: Sequence[Place], inputs: Sequence[Tensor]) -> list[Draw]:
        """Sample the token of each place from its row of `logits` [B,V].

        Args:
            inputs: of the method `inputs`, on the device.

        Raises:
            RolloutError: the logits after a sequence are not finite, or nothing that its request allows may follow.
        """
        positions, penalised, banned, *others = inputs
        if self._has_columns:
            columns, others = others[:_NUM_COLUMNS], others[_NUM_COLUMNS:]
            self._sequences = [place.sequence for place in places]
            params = [place.sampling for place in places]
            self._table = SamplingTable.of_columns(params, columns, logits.shape[1])
        assert self._table is not None
        draw = partial(
            self._draw, logits, self._table, positions,
            penalised=penalised if len(penalised) else None, banned=banned if len(banned) else None,
            controls=Controls(*others) if others else None,
        )
        sampled = _on_host(draw(num_likeliest=self._table.num_likeliest))
        if not all(sampled[3]):  # seldom: a nucleus of more than `num_likeliest` tokens
            sampled = _on_host(draw())
        rows = zip(places, *sampled, strict=True)
        return [_checked(place, Draw(int(token), logprob, raw)) for place, token, logprob, raw, _ in rows]


def _controls(places: Sequence[Place], vocab_size: int) -> Controls | None:
    """Return the changes of the logits of these places; None if no request asks for any."""
    if not any(place.sequence.request.has_controls for place in places):
        return None
    return Controls.build(
        [dict(place.sampling.logit_bias) for place in places], [place.charges for place in places],
        [place.allowed(vocab_size) for place in places],
    )


def _checked(place: Place, draw: Draw) -> Draw:
    """Return a draw; see `Sampler.draw` for the errors."""
    require_number(draw.raw_logprob, place.end)
    if not place.is_drafted:  # other draws are perhaps not kept
        require_choice(draw.logprob, place.number)
    return draw


def _on_host(sampled: Sampled) -> list[list[float]]:
    """Return tokens, logprobs, raw_logprobs and is_exact of each row, by one transfer: float64 holds token ids."""
    is_exact = torch.ones_like(sampled.logprobs) if sampled.is_exact is None else sampled.is_exact
    columns = (sampled.tokens, sampled.logprobs, sampled.raw_logprobs, is_exact)
    rows: list[list[float]] = torch.stack([column.double() for column in columns]).tolist()
    return rows


def record_logprobs(
    hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor],
    outputs: Sequence[tuple[TokenSequence, slice]],
) -> None:
    """Store the log-probs of given tokens in their sequences.

    Args:
        hidden: [M, hidden size], final hidden states after which a given token stands.
        targets: [M] int64, of `scored_targets`, on the same device.
        head: computes logits [B,V] from hidden states [B, hidden size].
        outputs: each sequence with its rows of `hidden`, which follow those that it has log-probs of.

    Raises:
        RolloutError: the logits of a sequence are not finite.
    """
    pieces = zip(hidden.split(_ROWS), targets.split(_ROWS), strict=True)
    blocks = [token_logprobs(head(states), tokens) for states, tokens in pieces]
    logprobs = torch.cat(blocks).tolist()
    for sequence, rows in outputs:
        for logprob in logprobs[rows]:
            require_number(logprob, sequence.num_computed)
        sequence.raw_logprobs += logprobs[rows]


def scored_targets(outputs: Sequence[tuple[TokenSequence, slice]]) -> Tensor:
    """Return the given token after each row [M] int64, on the host; arguments as in `record_logprobs`."""
    token_ids: list[int] = []
    for sequence, rows in outputs:
        start = len(sequence.raw_logprobs)
        token_ids += sequence.scored_ids[start : start + rows.stop - rows.start]
    return torch.tensor(token_ids, dtype=torch.int64)


def require_choice(logprob: float, num_tokens: int) -> None:
    """Raises:
    RolloutError: the log-prob of a draw after so many tokens of a completion says that there was nothing to draw.
    """
    if not isfinite(logprob):
        raise RolloutError(
            f"after {num_tokens} tokens of a completion, banned_words, banned_token_ids and logit_bias leave no "
            "token that may follow; ban fewer"
        )


def require_number(logprob: float, num_tokens: int) -> None:
    """Raises:
    RolloutError: a log-prob after so many tokens is no number.
    """
    if logprob != logprob:
        raise RolloutError(
            f"the model's logits must be finite, and after {num_tokens} tokens they are not; check the "
            "weights, or use float32"
        )


def _pairs(tokens: Sequence[Collection[int]]) -> Tensor:
    """Return (row, token) of every token of every row, [M,2] int64."""
    pairs = [(row, token) for row, ids in enumerate(tokens) for token in ids]
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)

"""The step from logits to the next token of each sequence, or to the log-probs of given tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import Tensor

from alignlab.errors import RolloutError
from alignlab.rollout.embedded.sampling import Sampled, SamplingTable, sample, token_logprobs
from alignlab.rollout.embedded.sequence import TokenSequence

_ROWS = 256
"""Rows whose logits are computed together when given tokens are scored: those of a whole step may not fit in memory."""


class Sampler:
    """Samples for a batch of sequences that mostly stays the same from step to step.

    The parameters of a batch are moved to the device once, and used until the batch changes. What a step needs besides
    is given out as host tensors, so that it travels with the step's tokens in one copy.
    """

    def __init__(self) -> None:
        self._sequences: list[TokenSequence] = []
        self._table: SamplingTable | None = None

    def inputs(self, sequences: list[TokenSequence], vocab_size: int) -> list[Tensor]:
        """Return the host tensors that `append_tokens` takes on the device for these sequences."""
        tensors = [
            torch.tensor([s.num_sampled for s in sequences]),
            _pairs([s.penalised_ids for s in sequences]),
            _pairs([s.banned_ids for s in sequences]),
        ]
        if self._table is None or self._sequences != sequences:
            params, keys = [s.request.sampling for s in sequences], [s.key for s in sequences]
            tensors += SamplingTable.columns(params, keys, vocab_size)
        return tensors

    def append_tokens(
        self, logits: Tensor, sequences: list[TokenSequence], inputs: Sequence[Tensor], policy_version: int
    ) -> None:
        """Sample the next token of each sequence from its row of `logits` [B,V], and append it.

        Args:
            inputs: of the method `inputs`, on the device.

        Raises:
            RolloutError: the logits of a sequence are not finite.
        """
        positions, penalised, banned, *columns = inputs
        if columns:
            params = [s.request.sampling for s in sequences]
            self._sequences, self._table = sequences, SamplingTable.of_columns(params, columns, logits.shape[1])
        assert self._table is not None
        draw = partial(
            sample, logits, self._table, positions,
            penalised=penalised if len(penalised) else None, banned=banned if len(banned) else None,
        )
        sampled = _on_host(draw(num_likeliest=self._table.num_likeliest))
        if not all(sampled[3]):  # seldom: a nucleus of more than `num_likeliest` tokens
            sampled = _on_host(draw())
        for sequence, token, logprob, raw_logprob, _ in zip(sequences, *sampled, strict=True):
            _require_number(raw_logprob, sequence)
            sequence.append(int(token), logprob, raw_logprob, policy_version)


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
            _require_number(logprob, sequence)
        sequence.raw_logprobs += logprobs[rows]


def scored_targets(outputs: Sequence[tuple[TokenSequence, slice]]) -> Tensor:
    """Return the given token after each row [M] int64, on the host; arguments as in `record_logprobs`."""
    token_ids: list[int] = []
    for sequence, rows in outputs:
        start = len(sequence.raw_logprobs)
        token_ids += sequence.scored_ids[start : start + rows.stop - rows.start]
    return torch.tensor(token_ids, dtype=torch.int64)


def _require_number(logprob: float, sequence: TokenSequence) -> None:
    if logprob != logprob:
        raise RolloutError(
            f"the model's logits must be finite, and after {sequence.num_computed} tokens they are not; check the "
            "weights, or use float32"
        )


def _pairs(tokens: Sequence[Collection[int]]) -> Tensor:
    """Return (row, token) of every token of every row, [M,2] int64."""
    pairs = [(row, token) for row, ids in enumerate(tokens) for token in ids]
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)

"""The step from logits to the next token of each sequence, or to the log-probs of given tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from alignlab.errors import RolloutError
from alignlab.rollout.embedded.sampling import SamplingTable, sample, token_logprobs
from alignlab.rollout.embedded.sequence import TokenSequence
from alignlab.transfer import to_device

_ROWS = 256
"""Rows whose logits are computed together when given tokens are scored: those of a whole step may not fit in memory."""


class Sampler:
    """Samples for a batch of sequences that mostly stays the same from step to step.

    The parameters of a batch are moved to the device once, and used until the batch changes.
    """

    def __init__(self) -> None:
        self._sequences: list[TokenSequence] = []
        self._table: SamplingTable | None = None

    def append_tokens(self, logits: Tensor, sequences: list[TokenSequence], policy_version: int) -> None:
        """Sample the next token of each sequence from its row of `logits` [B,V], and append it.

        Raises:
            RolloutError: the logits of a sequence are not finite.
        """
        device = logits.device
        if self._table is None or self._sequences != sequences:
            params, keys = [s.request.sampling for s in sequences], [s.key for s in sequences]
            self._sequences = sequences
            self._table = SamplingTable.build(params, keys, vocab_size=logits.shape[1], device=device)
        positions, penalised, banned = to_device(
            [
                torch.tensor([s.num_sampled for s in sequences]),
                _pairs([s.penalised_ids for s in sequences]),
                _pairs([s.banned_ids for s in sequences]),
            ],
            device,
        )
        sampled = sample(
            logits, self._table, positions,
            penalised=penalised if len(penalised) else None, banned=banned if len(banned) else None,
        )
        # float64 holds token ids exactly, so that one transfer brings all three to the host.
        packed = torch.stack([sampled.tokens.double(), sampled.logprobs.double(), sampled.raw_logprobs.double()])
        for sequence, token, logprob, raw_logprob in zip(sequences, *packed.tolist(), strict=True):
            _require_number(raw_logprob, sequence)
            sequence.append(int(token), logprob, raw_logprob, policy_version)


def record_logprobs(
    hidden: Tensor, head: Callable[[Tensor], Tensor], outputs: Sequence[tuple[TokenSequence, slice]]
) -> None:
    """Store the log-probs of given tokens in their sequences.

    Args:
        hidden: [M, hidden size], final hidden states after which a given token stands.
        head: computes logits [B,V] from hidden states [B, hidden size].
        outputs: each sequence with its rows of `hidden`; none was pre-empted since its first rows.

    Raises:
        RolloutError: the logits of a sequence are not finite.
    """
    token_ids: list[int] = []
    for sequence, rows in outputs:
        start = len(sequence.raw_logprobs)
        token_ids += sequence.scored_ids[start : start + rows.stop - rows.start]
    [targets] = to_device([torch.tensor(token_ids)], hidden.device)
    pieces = zip(hidden.split(_ROWS), targets.split(_ROWS), strict=True)
    blocks = [token_logprobs(head(states), tokens) for states, tokens in pieces]
    logprobs = torch.cat(blocks).tolist()
    for sequence, rows in outputs:
        for logprob in logprobs[rows]:
            _require_number(logprob, sequence)
        sequence.raw_logprobs += logprobs[rows]


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

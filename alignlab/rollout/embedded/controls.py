"""Changes of logits that requests ask for beside temperature and truncation, as pure functions of tensors.

Shapes: B rows, V vocabulary, M (row, token) pairs, R rows that only some tokens may follow.

Order of the changes, which is vLLM's: logit bias, repetition penalty, frequency and presence penalty, banned tokens;
then, of what may follow, the tokens that a forced place or a grammar allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Controls:
    """Changes of one step's logits, on the host or on the device.

    Attributes:
        bias_pairs, bias: [M,2] int64 distinct (row, token) pairs, and [M] float32 added to their logits first.
        charge_pairs, charges: [M,2] and [M], taken off after the repetition penalty.
        rows: [R] int64, rows that only some tokens may follow.
        allowed: [R, V / 8 rounded up] uint8, a bit for each token that may, the lowest first.
    """

    bias_pairs: Tensor
    bias: Tensor
    charge_pairs: Tensor
    charges: Tensor
    rows: Tensor
    allowed: Tensor

    NUM_TENSORS = 6

    def tensors(self) -> list[Tensor]:
        """Return the tensors in the order of the constructor."""
        return [self.bias_pairs, self.bias, self.charge_pairs, self.charges, self.rows, self.allowed]

    @classmethod
    def build(
        cls, bias: Sequence[Mapping[int, float]], charges: Sequence[Mapping[int, float]],
        allowed: Sequence[NDArray[np.uint8] | None],
    ) -> Controls | None:
        """Return the controls of rows on the host; None if they change nothing.

        Args:
            bias, charges: of each row, by token.
            allowed: packed bits of each row; None where every token may follow.
        """
        rows = [row for row, bits in enumerate(allowed) if bits is not None]
        if not (rows or any(bias) or any(charges)):
            return None
        packed = [bits for bits in allowed if bits is not None]
        bits = torch.from_numpy(np.stack(packed)) if packed else torch.empty((0, 0), dtype=torch.uint8)
        return cls(*_entries(bias), *_entries(charges), torch.tensor(rows, dtype=torch.int64), bits)


def _entries(values: Sequence[Mapping[int, float]]) -> tuple[Tensor, Tensor]:
    """Return the (row, token) pairs [M,2] and the values [M] of each row's mapping."""
    pairs = [(row, token) for row, of_tokens in enumerate(values) for token in of_tokens]
    numbers = [value for of_tokens in values for value in of_tokens.values()]
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2), torch.tensor(numbers, dtype=torch.float32)


def added(logits: Tensor, pairs: Tensor, values: Tensor) -> Tensor:
    """Return `logits` [B,V] in float32 with `values` [M] added at `pairs` [M,2], which are distinct."""
    rows, tokens = pairs.unbind(1)
    raised = logits.float()
    return raised.index_put((rows, tokens), raised[rows, tokens] + values) if len(pairs) else raised


def penalised_repetition(logits: Tensor, pairs: Tensor, penalty: Tensor) -> Tensor:
    """Return `logits` [B,V] in float32, positive ones at `pairs` [M,2] divided and negative ones multiplied.

    Args:
        penalty: [B], of each row.

    Reference: Keskar et al. (2019), arXiv:1909.05858, Section 4.1; for negative logits as every engine has it.
    """
    rows, tokens = pairs.unbind(1)
    values, factor = logits[rows, tokens].float(), penalty[rows]
    values = torch.where(values > 0, values / factor, values * factor)
    return logits.float().index_put((rows, tokens), values)


def without(logits: Tensor, pairs: Tensor) -> Tensor:
    """Return `logits` [B,V] with those at `pairs` [M,2] at minus infinity, so that they have no probability."""
    floor = torch.full((), -torch.inf, dtype=logits.dtype, device=logits.device)
    return logits.index_put(pairs.unbind(1), floor)


def only(logits: Tensor, rows: Tensor, allowed: Tensor) -> Tensor:
    """Return `logits` [B,V] where in `rows` [R] all tokens but those of the packed bits `allowed` have no probability.
    """
    shifts = torch.arange(8, device=allowed.device, dtype=torch.uint8)
    mask = ((allowed[:, :, None] >> shifts) & 1).flatten(1)[:, : logits.shape[1]].bool()
    return logits.index_copy(0, rows, logits.index_select(0, rows).masked_fill(~mask, -torch.inf))


def packed_bits(tokens: Sequence[int], vocab_size: int) -> NDArray[np.uint8]:
    """Return the packed bits of a set of tokens, the lowest first."""
    mask = np.zeros(vocab_size, np.uint8)
    mask[list(tokens)] = 1
    return np.packbits(mask, bitorder="little")


def most_typical(weights: Tensor, typical_p: Tensor) -> Tensor:
    """Set the tokens that are not among the most typical to 0: those whose surprise is farthest from the entropy.

        keep the smallest set, by |-log p - H(p)|, that has at least `typical_p` of the probability

    Tokens that tie with the last one that is kept stay too.

    Args:
        weights: [B,V], >= 0, not all 0 in a row; need not sum to 1.
        typical_p: [B]; 1 keeps all.

    Reference: Meister et al. (2022), arXiv:2202.00666, Eq. 10.
    """
    probs = weights / weights.sum(-1, keepdim=True)
    surprise = -probs.log()
    entropy = torch.special.entr(probs).sum(-1, keepdim=True)
    distance = torch.where(probs > 0, (surprise - entropy).abs(), torch.inf)
    # Bisection over the bit patterns of float32, which have the order of the (non-negative) numbers.
    low = torch.full_like(typical_p, -1, dtype=torch.int32)
    high = distance.masked_fill(probs == 0, 0.0).amax(-1).view(torch.int32)
    for _ in range(32):
        middle = low + (high - low) // 2
        mass = torch.where(distance <= middle.view(torch.float32)[:, None], probs, 0.0).sum(-1)
        reached = (mass >= typical_p) & (middle >= 0)
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    kept = distance <= torch.where(typical_p < 1, high.view(torch.float32), torch.inf)[:, None]
    return torch.where(kept, weights, 0.0)

"""Products of single chunks of the gated delta rule, batched over all chunks: the WY form of Yang et al. (2024).

The rule, with keys and queries of L2 norm 1, a log decay g <= 0 and a writing strength b of each token:
    S_t = Diag(e^g_t) S_{t-1} + b_t k_t (v_t - k_t^T Diag(e^g_t) S_{t-1})^T,   o_t = S_t^T q_t
A head's decay is one number in Gated DeltaNet (arXiv:2412.06464, Eq. 10), one for each channel of its keys in Kimi
Delta Attention (arXiv:2510.26692, Eq. 1). With G the running sum of g in a chunk, and S the state that enters it:
    v' = u - w S,   o = (q e^G) S + A v',   S' = e^(G_C) S + (k e^(G_C - G))^T v'
where u and w solve unit triangular systems, and A holds the products of queries and keys, decayed between them.

Shapes: M chunks of C tokens, H heads, K key size, V value size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

_ROWS = 16
"""Tokens of a chunk whose decays are formed pair by pair where each channel has its own: memory grows with it."""


class ChunkProducts(NamedTuple):
    """The inputs of the scan over chunks; the symbols are those of the formulas above.

    Attributes:
        u: [M,H,C,V].
        w: [M,H,C,K].
        scores: A, [M,H,C,C].
        queries: q e^G, [M,H,C,K].
        keys: k e^(G_C - G), [M,H,C,K].
        decay: e^(G_C), [M,H,K,1] or [M,H,1,1].
    """

    u: Tensor
    w: Tensor
    scores: Tensor
    queries: Tensor
    keys: Tensor
    decay: Tensor


def chunk_products(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, strength: Tensor) -> ChunkProducts:
    """Return what chunks compute on their own.

    Args:
        query, key: [M,H,C,K], of norm 1, the query scaled.
        value: [M,H,C,V].
        log_decay: g, [M,H,C], or [M,H,C,K] with a decay for each channel.
        strength: b, [M,H,C].
    """
    if log_decay.dim() == key.dim():
        return _of_channels(query, key, value, log_decay, strength)
    return _of_heads(query, key, value, log_decay, strength)


def _of_heads(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, strength: Tensor) -> ChunkProducts:
    total = log_decay.cumsum(-1)
    decayed = (total[..., :, None] - total[..., None, :]).masked_fill(_later(query.shape[-2], query), -torch.inf).exp()
    weak = key * strength[..., None]
    between = key.transpose(-1, -2)
    grown = total.exp()[..., None]
    u, w = _solved((weak @ between) * decayed, value * strength[..., None], weak * grown)
    rest = (total[..., -1:] - total).exp()[..., None]
    return ChunkProducts(u, w, (query @ between) * decayed, query * grown, key * rest, total[..., -1:, None].exp())


def _of_channels(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, strength: Tensor) -> ChunkProducts:
    total = log_decay.cumsum(-2)
    weak = key * strength[..., None]
    u, w = _solved(_decayed_products(weak, key, total), value * strength[..., None], weak * total.exp())
    end = total[..., -1:, :]
    return ChunkProducts(
        u, w, _decayed_products(query, key, total), query * total.exp(), key * (end - total).exp(),
        end.exp().transpose(-1, -2),
    )


def _solved(triangle: Tensor, value: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return the solutions u and w of (1 + strictly lower part of the triangle) [u, w] = [value, key]."""
    both = torch.linalg.solve_triangular(triangle, torch.cat((value, key), -1), upper=False, unitriangular=True)
    u, w = both.split([value.shape[-1], key.shape[-1]], dim=-1)
    return u, w


def _later(count: int, like: Tensor) -> Tensor:
    """Return [count, count], true where the column is a later token than the row."""
    return torch.ones(count, count, dtype=torch.bool, device=like.device).triu(1)


def _decayed_products(rows: Tensor, columns: Tensor, total: Tensor) -> Tensor:
    """Return sum over k of rows_ik columns_jk e^(G_ik - G_jk), for j <= i, and 0 elsewhere: [M,H,C,C].

    No exponent is above 0, where e^G and e^-G apart would overflow: tokens of a block meet pair by pair, those of
    earlier blocks by way of the block's first token.
    """
    count = rows.shape[-2]
    blocks = []
    for first in range(0, count, _ROWS):
        end = min(first + _ROWS, count)
        own, before = slice(first, end), slice(0, first)
        decay = total[..., own, None, :] - total[..., None, own, :]
        decay = decay.masked_fill(_later(end - first, rows)[..., None], -torch.inf).exp()
        products = (rows[..., own, None, :] * columns[..., None, own, :] * decay).sum(-1)
        if first:
            middle = total[..., first : first + 1, :]
            left = rows[..., own, :] * (total[..., own, :] - middle).exp()
            right = columns[..., before, :] * (middle - total[..., before, :]).exp()
            products = torch.cat((left @ right.transpose(-1, -2), products), -1)
        blocks.append(pad(products, (0, count - end)))
    return torch.cat(blocks, -2)

"""From logits to tokens: every row with its own parameters, all rows in one pass.

Shapes: B rows, V vocabulary. A token is drawn by a race of exponential times, whose random numbers are functions of the
row's key and the token's position alone: the same request gives the same tokens in any batch.

Order of the steps: repetition penalty, banned tokens, temperature, top-k, top-p (of what top-k left), min-p. Tokens
that tie with the last one kept are kept too, so that no step depends on the order of equal logits. A truncation is a
floor under the probabilities, found by bisection: on a CPU a sort of the vocabulary costs ten times as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from alignlab.errors import RolloutError
from alignlab.types import SamplingParams

_CHUNK = 256  # tokens of the vocabulary reduced together where a row is searched on two levels
_COLDEST = 1e-4  # logits divided by less overflow
_BLOCK_ELEMENTS = 1 << 20  # on a CPU rows are sampled in blocks of this many logits, which stay in its cache
_INCREMENT, _MIX_1, _MIX_2 = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def check_sampling(sampling: SamplingParams) -> None:
    """Refuse parameters out of range or at odds with each other.

    Raises:
        RolloutError: with the rule, the value and the fix.
    """
    rules = {
        "n": (sampling.n >= 1, "be at least 1"),
        "temperature": (
            sampling.temperature == 0 or sampling.temperature >= _COLDEST,
            f"be 0, which is greedy, or at least {_COLDEST:g}",
        ),
        "top_k": (sampling.top_k >= 0, "be at least 0; 0 keeps all tokens"),
        "top_p": (0 < sampling.top_p <= 1, "be over 0 and at most 1; 1 keeps all tokens"),
        "min_p": (0 <= sampling.min_p < 1, "be at least 0 and under 1; 0 keeps all tokens"),
        "repetition_penalty": (sampling.repetition_penalty > 0, "be over 0; 1 is off"),
        "max_new_tokens": (sampling.max_new_tokens >= 1, "be at least 1"),
        "min_new_tokens": (
            0 <= sampling.min_new_tokens <= sampling.max_new_tokens, f"be from 0 to {sampling.max_new_tokens=}"
        ),
        "stop": ("" not in sampling.stop, "hold no empty string; leave it out"),
        "ignore_eos": (
            not sampling.ignore_eos or not (sampling.stop or sampling.stop_token_ids),
            "be False beside stop or stop_token_ids, because it ends a completion at max_new_tokens alone",
        ),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise RolloutError(f"sampling.{name} is {getattr(sampling, name)!r}, and must {rule}")


def stream_key(seed: int, token_ids: Sequence[int], index: int) -> int:
    """Key of the random numbers of one completion: a signed 64-bit hash of seed, prompt and completion index."""
    text = ",".join(map(str, (seed, index, *token_ids)))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def row_keys(keys: Tensor, positions: Tensor) -> Tensor:
    """A key of random numbers for each (completion, token), by SplitMix64.

    Args:
        keys: [B] int64, of the completions.
        positions: [B] int64, the number of the token in its completion.

    Returns:
        [B] int64.

    Reference: Steele, Lea, Flood (2014), "Fast splittable pseudorandom number generators".
    """
    state = keys + (positions + 1) * _INCREMENT
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    return state ^ _shift_right(state, 31)


def exponentials(keys: Tensor, first: int, count: int) -> Tensor:
    """`count` exponentially distributed numbers for each key, from the `first`th of its stream on.

    Args:
        keys: [B] int64.

    Returns:
        [B, count] float64, > 0.
    """
    numbers = torch.arange(first, first + count, device=keys.device)
    uniform = (_shift_right(row_keys(keys[:, None], numbers), 12).double() + 0.5) * 2.0**-52  # within (0, 1)
    return -torch.log1p(-uniform)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own copies the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True)
class SamplingTable:
    """Parameters of each row on the device, and, on the host, whether any row needs a step.

    Attributes, [B]:
        keys: of `stream_key`.
        greedy: rows at temperature 0.
        temperature, top_p, min_p, penalty: float32; the temperature of greedy rows is 1.
        top_k: float32; the vocabulary's size where it is off.
    """

    keys: Tensor
    greedy: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    penalty: Tensor
    any_greedy: bool
    all_greedy: bool
    any_temperature: bool
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool
    any_penalty: bool

    @classmethod
    def build(
        cls, rows: Sequence[SamplingParams], keys: Sequence[int], *, vocab_size: int, device: torch.device
    ) -> SamplingTable:
        """The table of `rows`."""
        columns = [
            (r.temperature, min(r.top_k or vocab_size, vocab_size), r.top_p, r.min_p, r.repetition_penalty)
            for r in rows
        ]
        floats = torch.tensor(columns, dtype=torch.float32).T.contiguous().to(device)
        greedy = floats[0] == 0
        sampled = [r for r in rows if r.temperature > 0]
        return cls(
            keys=torch.tensor(keys, dtype=torch.int64).to(device), greedy=greedy,
            temperature=torch.where(greedy, 1.0, floats[0]), top_k=floats[1], top_p=floats[2], min_p=floats[3],
            penalty=floats[4], any_greedy=len(sampled) < len(rows), all_greedy=not sampled,
            any_temperature=any(r.temperature != 1 for r in sampled),
            any_top_k=any(0 < r.top_k < vocab_size for r in sampled),
            any_top_p=any(r.top_p < 1 for r in sampled), any_min_p=any(r.min_p > 0 for r in sampled),
            any_penalty=any(r.repetition_penalty != 1 for r in rows),
        )

    def rows(self, block: slice) -> SamplingTable:
        """The rows of `block` alone; the flags stay those of the whole table."""
        tensors: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: t[block] for name, t in tensors.items() if isinstance(t, Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True)
class Sampled:
    """Tokens [B] int64; their log-probs [B] under the distribution sampled from and under the model's own."""

    tokens: Tensor
    logprobs: Tensor
    raw_logprobs: Tensor


def sample(
    logits: Tensor, table: SamplingTable, positions: Tensor, *,
    seen: Tensor | None = None, banned: Tensor | None = None,
) -> Sampled:
    """One token for each row.

    Args:
        logits: [B,V].
        table: parameters of the rows.
        positions: [B] int64, the number of the token in its completion.
        seen: [M,2] int64, distinct (row, token) pairs that the repetition penalty applies to.
        banned: [M,2] int64, (row, token) pairs that must not be drawn.

    Returns:
        Greedy rows draw from all the mass on one token: their `logprobs` are 0.
    """
    adjusted = adjust_logits(logits, table, seen, banned)
    keys = row_keys(table.keys, positions)
    count = logits.shape[0]
    step = count if logits.is_cuda else max(1, _BLOCK_ELEMENTS // logits.shape[1])
    parts = [
        _sample_block(
            logits[block], None if adjusted is None else adjusted[block], table.rows(block), keys[block]
        )
        for block in (slice(start, start + step) for start in range(0, count, step))
    ]
    return Sampled(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def adjust_logits(logits: Tensor, table: SamplingTable, seen: Tensor | None, banned: Tensor | None) -> Tensor | None:
    """`logits` [B,V] after penalty and bans, or None where there are none. Arguments as in `sample`."""
    adjusted = None
    if seen is not None:
        rows, tokens = seen.unbind(1)
        values, factor = logits[rows, tokens].float(), table.penalty[rows]
        values = torch.where(values > 0, values / factor, values * factor)
        adjusted = logits.float().index_put((rows, tokens), values)
    if banned is not None:
        adjusted = logits if adjusted is None else adjusted
        floor = torch.tensor(-torch.inf, dtype=adjusted.dtype, device=logits.device)
        adjusted = adjusted.index_put(banned.unbind(1), floor)
    return adjusted


def _sample_block(
    logits: Tensor, adjusted: Tensor | None, table: SamplingTable, keys: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, logprobs, raw_logprobs) of a block of rows; `adjusted` is None where penalty and bans change nothing."""
    raw = logits.float()
    shaped = raw if adjusted is None else adjusted.float()
    if table.any_temperature:
        shaped = shaped / table.temperature[:, None]
    if table.all_greedy:
        tokens = argmax(shaped)
        raw_logprobs = _picked(raw, tokens) - log_normalizer(raw, raw.softmax(-1))
        return tokens, torch.zeros_like(raw_logprobs), raw_logprobs
    probs = shaped.softmax(-1)
    weights = truncate(probs, table)
    tokens, totals = race(weights, keys)
    if table.any_greedy:
        tokens = torch.where(table.greedy, argmax(shaped), tokens)
    logprobs = torch.where(table.greedy, 0.0, (_picked(weights, tokens).double() / totals).log().float())
    raw_probs = raw.softmax(-1) if shaped is not raw else probs
    raw_logprobs = _picked(raw, tokens) - log_normalizer(raw, raw_probs)
    return tokens, logprobs, raw_logprobs


def log_normalizer(logits: Tensor, probs: Tensor) -> Tensor:
    """log sum exp of `logits` [B,V] -> [B], from their softmax `probs`.

    The likeliest token's probability is 1 / sum exp(logits - peak), and the softmax kernel is the fastest way to it.
    The kernel's own sum loses the small terms of a large vocabulary (1e-5 of 49,152), so it is divided by what is left.
    """
    return logits.amax(-1) - (probs.amax(-1) / probs.sum(-1)).log()


def truncate(probs: Tensor, table: SamplingTable) -> Tensor:
    """`probs` [B,V] with the tokens outside top-k, top-p and min-p set to 0, not normalised again."""
    weights = probs
    if table.any_top_k:
        weights = _at_least(weights, _floor(weights, table.top_k, count=True))
    if table.any_top_p:
        floor = _floor(weights, table.top_p * weights.sum(-1), count=False)
        weights = _at_least(weights, torch.where(table.top_p < 1, floor, 0.0))
    if table.any_min_p:
        weights = _at_least(weights, table.min_p * probs.amax(-1))
    return weights


def _at_least(weights: Tensor, floor: Tensor) -> Tensor:
    """`weights` [B,V] with those under `floor` [B] set to 0."""
    return torch.ge(weights, floor[:, None], out=torch.empty_like(weights)).mul_(weights)


def _floor(weights: Tensor, target: Tensor, *, count: bool) -> Tensor:
    """The highest floor [B] over which `weights` [B,V], or their number if `count`, still sum to `target` [B].

    Bisection over the bit patterns of float32, which are ordered as the (non-negative) numbers are: exact.
    """
    low = torch.zeros_like(target, dtype=torch.int32)
    high = weights.amax(-1).view(torch.int32) + 1
    kept = torch.empty_like(weights)
    for _ in range(31):
        middle = low + (high - low) // 2
        torch.ge(weights, middle.view(torch.float32)[:, None], out=kept)
        reached = (kept if count else kept.mul_(weights)).sum(-1) >= target
        low, high = torch.where(reached, middle, low), torch.where(reached, high, middle)
    return low.view(torch.float32)


def race(weights: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """A token drawn by its weight: the first to arrive where arrival times are exponential, with the weights as rates.

    The draw changes only where two tokens arrive at about the same time, so that rounding of the weights, which no two
    ways of computing them share, almost never changes it; inverting the cumulative distribution would move with every
    rounding of every token before. The race has two levels, first between chunks of the vocabulary, then inside one,
    and needs a random number for each of them alone. A token of weight 0 is never picked.

    Args:
        weights: [B,V] float32, >= 0, not all 0 in a row; need not sum to 1. Rows with nan give some token.
        keys: [B] int64, of `row_keys`.

    Returns:
        (tokens [B] int64, totals [B] float64)
    """
    chunks = _chunked(weights, 0.0)
    rates = chunks.sum(-1).double()
    chunk = (rates / exponentials(keys, 0, chunks.shape[1])).argmax(-1)
    inside = _chunk_of(chunks, chunk).double()
    token = (inside / exponentials(keys, chunks.shape[1], _CHUNK)).argmax(-1)
    return (chunk * _CHUNK + token).clamp(max=weights.shape[1] - 1), rates.sum(-1)


def argmax(values: Tensor) -> Tensor:
    """The first index of the largest value, [B,V] -> [B], on two levels: torch's own is ten times slower on a CPU."""
    chunks = _chunked(values, -torch.inf)
    chunk = chunks.amax(-1).argmax(-1)
    return chunk * _CHUNK + _chunk_of(chunks, chunk).argmax(-1)


def _chunked(values: Tensor, filler: float) -> Tensor:
    """[B,V] as [B, V / _CHUNK rounded up, _CHUNK]."""
    if values.shape[1] % _CHUNK:
        values = torch.nn.functional.pad(values, (0, -values.shape[1] % _CHUNK), value=filler)
    return values.view(values.shape[0], -1, _CHUNK)


def _chunk_of(chunks: Tensor, index: Tensor) -> Tensor:
    return chunks[torch.arange(chunks.shape[0], device=chunks.device), index]


def _picked(values: Tensor, tokens: Tensor) -> Tensor:
    return values.gather(1, tokens[:, None])[:, 0].float()

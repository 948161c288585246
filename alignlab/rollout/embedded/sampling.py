"""Sampling of tokens from logits: every row has its own parameters, and all rows are sampled in one pass.

Shapes: B rows, V vocabulary. A token is drawn by a race of exponential times. The random numbers depend on the row's
key and the token's position alone, so that the same logits give the same tokens in any batch. On a CPU the logits are
the same too; a GPU chooses its kernels by the size of the batch, which may round them differently.

Order of the steps: the changes of `controls`, temperature, top-k, top-p (of the tokens that top-k left), min-p, typical
sampling (of what those left). Tokens that tie with the least likely one that is left stay too, so that no step depends
on the order of equal logits. `truncation` finds the floors under the probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from alignlab.errors import RolloutError
from alignlab.rollout.embedded.controls import Controls, added, most_typical, only, penalised_repetition, without
from alignlab.rollout.embedded.random_numbers import exponentials, row_keys
from alignlab.rollout.embedded.truncation import at_least, floor_by_bisection, floors_among
from alignlab.transfer import to_device
from alignlab.types import SamplingParams

_CHUNK = 256  # tokens of the vocabulary reduced together where a row is searched on two levels
_COLDEST = 1e-4  # logits divided by less overflow
_BLOCK_ELEMENTS = 1 << 20  # on a CPU rows are sampled in blocks of this many logits, which stay in its cache
_NUCLEUS = 1024  # likeliest tokens among which a GPU looks for the floor of top-p


def check_sampling(sampling: SamplingParams) -> None:
    """Raise if parameters are out of range or contradict each other.

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
        "typical_p": (0 < sampling.typical_p <= 1, "be over 0 and at most 1; 1 keeps all tokens"),
        "repetition_penalty": (sampling.repetition_penalty > 0, "be over 0; 1 is off"),
        "presence_penalty": (isfinite(sampling.presence_penalty), "be finite; 0 is off"),
        "frequency_penalty": (isfinite(sampling.frequency_penalty), "be finite; 0 is off"),
        "max_new_tokens": (sampling.max_new_tokens >= 1, "be at least 1"),
        "min_new_tokens": (
            0 <= sampling.min_new_tokens <= sampling.max_new_tokens, f"be from 0 to {sampling.max_new_tokens=}"
        ),
        "stop": ("" not in sampling.stop, "hold no empty string; leave it out"),
        "ignore_eos": (
            not sampling.ignore_eos or not (sampling.stop or sampling.stop_token_ids),
            "be False with stop or stop_token_ids, because a completion then ends at max_new_tokens alone",
        ),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise RolloutError(f"sampling.{name} is {getattr(sampling, name)!r}, and must {rule}")


def stream_key(seed: int, token_ids: Sequence[int], index: int) -> int:
    """Return the key of a completion's random numbers: a signed 64-bit hash of seed, prompt and completion index."""
    text = ",".join(map(str, (seed, index, *token_ids)))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


@dataclass(frozen=True)
class SamplingTable:
    """Parameters of each row on the device, and flags on the host of the steps that any row needs.

    Attributes, [B]:
        keys: from `stream_key`.
        greedy: True for rows at temperature 0.
        temperature, top_p, min_p, penalty, typical_p: float32; the temperature of greedy rows is 1.
        top_k: float32; size of the vocabulary for rows without top-k.

    Attributes:
        num_likeliest: tokens of a row among which a GPU looks for the floors of top-k and top-p; None where they are
            looked for in the whole vocabulary, as on a CPU, or where no row has either.
    """

    keys: Tensor
    greedy: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    penalty: Tensor
    typical_p: Tensor
    any_greedy: bool
    all_greedy: bool
    any_temperature: bool
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool
    any_penalty: bool
    any_typical: bool
    num_likeliest: int | None

    @classmethod
    def build(
        cls, rows: Sequence[SamplingParams], keys: Sequence[int], *, vocab_size: int, device: torch.device
    ) -> SamplingTable:
        """Return the table of rows with these parameters and keys."""
        return cls.of_columns(rows, to_device(cls.columns(rows, keys, vocab_size), device), vocab_size)

    @staticmethod
    def columns(rows: Sequence[SamplingParams], keys: Sequence[int], vocab_size: int) -> list[Tensor]:
        """Return the host tensors that `of_columns` takes on the device: [6,B] float32 and [B] int64."""
        values = [
            (
                r.temperature, min(r.top_k or vocab_size, vocab_size), r.top_p, r.min_p, r.repetition_penalty,
                r.typical_p,
            )
            for r in rows
        ]
        return [torch.tensor(values, dtype=torch.float32).T.contiguous(), torch.tensor(keys, dtype=torch.int64)]

    @classmethod
    def of_columns(cls, rows: Sequence[SamplingParams], columns: Sequence[Tensor], vocab_size: int) -> SamplingTable:
        """Return the table of rows with these parameters, whose `columns` are on the device."""
        floats, row_keys = columns
        greedy = floats[0] == 0
        sampled = [r for r in rows if r.temperature > 0]
        return cls(
            keys=row_keys, greedy=greedy,
            temperature=torch.where(greedy, 1.0, floats[0]), top_k=floats[1], top_p=floats[2], min_p=floats[3],
            penalty=floats[4], typical_p=floats[5], any_greedy=len(sampled) < len(rows), all_greedy=not sampled,
            any_temperature=any(r.temperature != 1 for r in sampled),
            any_top_k=any(0 < r.top_k < vocab_size for r in sampled),
            any_top_p=any(r.top_p < 1 for r in sampled), any_min_p=any(r.min_p > 0 for r in sampled),
            any_penalty=any(r.repetition_penalty != 1 for r in rows),
            any_typical=any(r.typical_p < 1 for r in sampled),
            num_likeliest=_num_likeliest(sampled, vocab_size) if floats.is_cuda else None,
        )

    def rows(self, block: slice) -> SamplingTable:
        """Return the rows of `block` alone; the flags stay those of the whole table."""
        tensors: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: t[block] for name, t in tensors.items() if isinstance(t, Tensor)}
        return replace(self, **tensors)


def _num_likeliest(sampled: Sequence[SamplingParams], vocab_size: int) -> int | None:
    """Return how many of each row's likeliest tokens decide on top-k and, nearly always, on top-p."""
    needed = [r.top_k or (_NUCLEUS if r.top_p < 1 else 0) for r in sampled]
    most = min(max(needed, default=0), vocab_size)
    return most or None


@dataclass(frozen=True)
class Sampled:
    """Sampled tokens [B] int64, and their log-probs [B] under the distribution sampled from and the model's own.

    Attributes:
        is_exact: [B] bool, False for rows that must be sampled again without `num_likeliest`; None if there are none.
    """

    tokens: Tensor
    logprobs: Tensor
    raw_logprobs: Tensor
    is_exact: Tensor | None = None


def sample(
    logits: Tensor, table: SamplingTable, positions: Tensor, *,
    penalised: Tensor | None = None, banned: Tensor | None = None, controls: Controls | None = None,
    num_likeliest: int | None = None,
) -> Sampled:
    """Sample one token for each row.

    Args:
        logits: [B,V].
        table: parameters of the rows.
        positions: [B] int64, number of the token in its completion.
        penalised: [M,2] int64, distinct (row, token) pairs that the repetition penalty applies to.
        banned: [M,2] int64, (row, token) pairs that must not be drawn.
        controls: further changes of the logits; None for none.
        num_likeliest: truncate by this many of each row's likeliest tokens, of `SamplingTable.num_likeliest`; None
            truncates by the whole vocabulary.

    Returns:
        The tokens; `logprobs` of greedy rows are 0, because all probability is on one token. Where no token may follow
        they are no finite numbers.
    """
    adjusted = adjust_logits(logits, table, penalised, banned, controls)
    keys = row_keys(table.keys, positions)
    count = logits.shape[0]
    step = count if logits.is_cuda else max(1, _BLOCK_ELEMENTS // logits.shape[1])
    blocks = [
        _sample_block(
            logits[block], None if adjusted is None else adjusted[block], table.rows(block), keys[block], num_likeliest
        )
        for block in (slice(start, start + step) for start in range(0, count, step))
    ]
    return blocks[0] if len(blocks) == 1 else _joined(blocks)


def _joined(blocks: Sequence[Sampled]) -> Sampled:
    """Return blocks of rows as one; all of them were truncated alike, so that `is_exact` is there in all or in none."""
    is_exact = [block.is_exact for block in blocks if block.is_exact is not None]
    return Sampled(
        torch.cat([block.tokens for block in blocks]), torch.cat([block.logprobs for block in blocks]),
        torch.cat([block.raw_logprobs for block in blocks]), torch.cat(is_exact) if is_exact else None,
    )


def adjust_logits(
    logits: Tensor, table: SamplingTable, penalised: Tensor | None, banned: Tensor | None,
    controls: Controls | None = None,
) -> Tensor | None:
    """Return `logits` [B,V] after the changes of `controls`; None if there are none. Arguments as in `sample`."""
    adjusted = logits
    if controls is not None:
        adjusted = added(adjusted, controls.bias_pairs, controls.bias)
    if penalised is not None:
        adjusted = penalised_repetition(adjusted, penalised, table.penalty)
    if controls is not None:
        adjusted = added(adjusted, controls.charge_pairs, controls.charges)
    if banned is not None:
        adjusted = without(adjusted, banned)
    if controls is not None and len(controls.rows):
        adjusted = only(adjusted, controls.rows, controls.allowed)
    return None if adjusted is logits else adjusted


def _sample_block(
    logits: Tensor, adjusted: Tensor | None, table: SamplingTable, keys: Tensor, num_likeliest: int | None
) -> Sampled:
    """Sample a block of rows; `adjusted` is None without penalty and bans."""
    raw = logits.float()
    shaped = raw if adjusted is None else adjusted.float()
    if table.any_temperature:
        shaped = shaped / table.temperature[:, None]
    if table.all_greedy:
        tokens = argmax(shaped)
        return Sampled(tokens, _greedy_logprobs(shaped, tokens), token_logprobs(raw, tokens))
    probs = shaped.softmax(-1)
    weights, is_exact = truncate(probs, table, num_likeliest)
    tokens, totals = race(weights, keys)
    if table.any_greedy:
        tokens = torch.where(table.greedy, argmax(shaped), tokens)
    logprobs = (_picked(weights, tokens).double() / totals).log().float()
    if table.any_greedy:
        logprobs = torch.where(table.greedy, _greedy_logprobs(shaped, tokens), logprobs)
    raw_probs = raw.softmax(-1) if shaped is not raw else probs
    raw_logprobs = _picked(raw, tokens) - log_normalizer(raw, raw_probs)
    return Sampled(tokens, logprobs, raw_logprobs, None if is_exact is None else is_exact | table.greedy)


def _greedy_logprobs(shaped: Tensor, tokens: Tensor) -> Tensor:
    """Return 0 for each row's likeliest token [B]; -inf where no token may follow, so that this one may not either."""
    picked = _picked(shaped, tokens)
    return torch.where(picked == -torch.inf, picked, 0.0)


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-prob [B] float32 of one token [B] in each row of `logits` [B,V]."""
    raw = logits.float()
    return _picked(raw, tokens) - log_normalizer(raw, raw.softmax(-1))


def log_normalizer(logits: Tensor, probs: Tensor) -> Tensor:
    """Return log sum exp of `logits` [B,V] -> [B], from their softmax `probs`.

    The probability of the likeliest token is 1 / sum exp(logits - peak), and the softmax kernel is the fastest way to
    it. The kernel's sum loses small terms of a large vocabulary (1e-5 of 49,152), so the result is normalised again.
    """
    return logits.amax(-1) - (probs.amax(-1) / probs.sum(-1)).log()


def truncate(probs: Tensor, table: SamplingTable, num_likeliest: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Set the tokens outside top-k, top-p, min-p and the typical set to 0, without normalising again.

    Args:
        probs: [B,V].
        table: parameters of the rows.
        num_likeliest: see `sample`.

    Returns:
        The weights [B,V]; and [B] bool, False for rows whose top-p reaches beyond their `num_likeliest` likeliest
        tokens, so that their weights are wrong. None if all are right.
    """
    is_exact = None
    if num_likeliest is None:
        weights = _truncate_by_bisection(probs, table)
    else:
        floor, is_exact = floors_among(
            probs, num_likeliest, top_k=table.top_k if table.any_top_k else None,
            top_p=table.top_p if table.any_top_p else None,
        )
        weights = at_least(probs, floor)
    if table.any_min_p:
        weights = at_least(weights, table.min_p * probs.amax(-1))
    if table.any_typical:
        weights = most_typical(weights, table.typical_p)
    return weights, is_exact


def _truncate_by_bisection(probs: Tensor, table: SamplingTable) -> Tensor:
    weights = probs
    if table.any_top_k:
        weights = at_least(weights, floor_by_bisection(weights, table.top_k, count=True))
    if table.any_top_p:
        floor = floor_by_bisection(weights, table.top_p * weights.sum(-1), count=False)
        weights = at_least(weights, torch.where(table.top_p < 1, floor, 0.0))
    return weights


def race(weights: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token by its weight: the first to arrive if arrival times are exponential, with the weights as rates.

    Rounding of the weights differs between any two ways to compute them. It changes the draw only if two tokens arrive
    at almost the same time; inverting the cumulative distribution would depend on the rounding of every token before.
    The race has two levels, between chunks of the vocabulary and within one, and needs random numbers for these alone.
    A token of weight 0 is never drawn.

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
    """Return the first index of the largest value, [B,V] -> [B]; on a CPU ten times as fast as torch's own argmax."""
    chunks = _chunked(values, -torch.inf)
    chunk = chunks.amax(-1).argmax(-1)
    return chunk * _CHUNK + _chunk_of(chunks, chunk).argmax(-1)


def _chunked(values: Tensor, filler: float) -> Tensor:
    """Return [B,V] as [B, V / _CHUNK rounded up, _CHUNK]."""
    if values.shape[1] % _CHUNK:
        values = torch.nn.functional.pad(values, (0, -values.shape[1] % _CHUNK), value=filler)
    return values.view(values.shape[0], -1, _CHUNK)


def _chunk_of(chunks: Tensor, index: Tensor) -> Tensor:
    return chunks[torch.arange(chunks.shape[0], device=chunks.device), index]


def _picked(values: Tensor, tokens: Tensor) -> Tensor:
    return values.gather(1, tokens[:, None])[:, 0].float()

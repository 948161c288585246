"""A cache with a budget of tokens for each sequence: the first, the recent, and those that are attended to most.

A prompt is computed exactly. At its end, and then after every `interval` tokens, the tokens over the budget are dropped
for good; see `heavy_hitters` for the choice. Tokens keep their true positions. Layers with a window of their own keep
it. Gradients go through the tokens that a query saw, and none through the choice.

Shapes: N tokens, H heads, K kv heads, D size of a query's or key's head, V size of a value's head; E tokens of all
sequences, each with its prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alignlab.models.attention_plan import Block, attention_blocks
from alignlab.models.cache_spec import LayerCacheSpec
from alignlab.models.kv_approximation.eviction_record import NEVER, recorded_drops
from alignlab.models.kv_approximation.heavy_hitters import (
    ScoreOptions,
    attention_received,
    dropped_places,
    kept_places,
)
from alignlab.models.packed_attention import Hide, block_attention, in_autocast_dtype, packed_attention
from alignlab.models.sink_window import KeptTokens, Window
from alignlab.transfer import to_device
from alignlab.types import Segments


@dataclass(frozen=True)
class EvictedTokens:
    """Tokens over a budget are dropped at the end of the prompt and at boundaries after it.

    Attributes:
        kept: what stays.
        accumulate: what tokens received at earlier boundaries counts too.
    """

    kept: KeptTokens
    accumulate: bool

    def drops_in(self, spec: LayerCacheSpec) -> bool:
        """Return whether tokens of a layer are dropped."""
        return spec.window is None

    def windows(self, spec: LayerCacheSpec) -> tuple[Window, ...]:
        """Return the window of a layer's keys and values, and that of its queries, if they are kept."""
        return (self.kept, self.kept.query_window) if self.drops_in(spec) else (spec.window,)

    def block_bytes(self, spec: LayerCacheSpec, dtype: torch.dtype, block_size: int) -> dict[Window, int]:
        """Return the bytes of a block of a layer's tokens, by window, in a model of a dtype."""
        size = dtype.itemsize * block_size
        if not self.drops_in(spec):
            return {spec.window: size * spec.token_numel}
        of_queries = size * spec.query_heads * spec.key_size
        return {self.kept: size * spec.token_numel, self.kept.query_window: of_queries}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, segments: Segments, record: Tensor | None = None,
        *, scaling: float, sliding_window: int | None, softcap: float | None, sinks: Tensor | None,
    ) -> Tensor:
        """Return packed attention to the tokens that each query still finds; see `KVApproximation`.

        A segment that continues no other is a prompt. A completion without a record drops tokens by its own numbers.
        """
        if sliding_window is not None:
            return packed_attention(
                query, key, value, segments, scaling=scaling, sliding_window=sliding_window, softcap=softcap,
                sinks=sinks,
            )
        query, key, value = in_autocast_dtype(query, key, value)
        options = ScoreOptions(scaling, softcap, None if sinks is None else sinks.detach())
        drops = self._drops_of_pack(query.detach()[0], key.detach()[0], segments, record, options)
        return block_attention(
            query, key, value, attention_blocks(segments, None), scaling=scaling, softcap=softcap, sinks=sinks,
            hide=None if drops is None else _hide_dropped(segments, drops),
        )

    def _drops_of_pack(
        self, query: Tensor, key: Tensor, segments: Segments, record: Tensor | None, options: ScoreOptions
    ) -> Tensor | None:
        """Return the boundary [K,E] that drops each token of the completions' sequences; None without completions."""
        has_record = None if record is None else _has_record(segments, record)
        drops = []
        for index, prefix in enumerate(segments.prefixes):
            if prefix < 0:
                continue
            prompt, own = (slice(segments.starts[i], segments.starts[i] + segments.lengths[i]) for i in (prefix, index))
            if record is not None and has_record is not None and has_record[prefix] and has_record[index]:
                drops.append(recorded_drops(record[prompt], record[own], len(key), self.kept))
            else:
                queries, keys = (torch.cat((x[:, prompt], x[:, own]), dim=1) for x in (query, key))
                drops.append(self.drops(queries, keys, segments.lengths[prefix], options))
        return torch.cat(drops, dim=1) if drops else None

    def drops(self, query: Tensor, key: Tensor, num_prompt: int, options: ScoreOptions) -> Tensor:
        """Return the boundary [K,n] that drops each of a sequence's tokens, `NEVER` for those that stay.

        Args:
            query, key: [H,n,D] and [K,n,D], positions applied, of the prompt and of what follows it.
            num_prompt: tokens of the prompt.
        """
        num_kv, count, device = len(key), key.shape[1], key.device
        drops = torch.full((num_kv, count), NEVER, dtype=torch.int64, device=device)
        positions = torch.empty(num_kv, 0, dtype=torch.int64, device=device)
        received, end, boundary = None, 0, num_prompt
        while boundary < count:
            new = torch.arange(end, boundary, device=device).expand(num_kv, -1)
            positions, end = torch.cat((positions, new), dim=1), boundary
            if positions.shape[1] > self.kept.budget:
                places, received = self.choose(
                    query[:, max(0, boundary - self.kept.observed) : boundary].transpose(0, 1),
                    key.gather(1, positions[..., None].expand(-1, -1, key.shape[2])), positions, received, options,
                    end=boundary,
                )
                drops.scatter_(1, positions.gather(1, dropped_places(places, positions.shape[1])), boundary)
                positions = positions.gather(1, places)
            following = self.kept.next_boundary(boundary, num_prompt)
            if following is None:
                break
            boundary = following
        return drops

    def choose(
        self, query: Tensor, key: Tensor, positions: Tensor, received: Tensor | None, options: ScoreOptions,
        *, end: int,
    ) -> tuple[Tensor, Tensor]:
        """Return the places [K,budget] of the tokens that stay at a boundary, and what they have received [K,budget].

        Args:
            query: [m,H,D], of the observed tokens, the last ones.
            key: [K,n,D], of the tokens that are there.
            positions: [K,n], theirs, rising.
            received: [K,budget], of the first ones, at the boundaries before; None at the first.
            end: one past the position of the last.
        """
        of_queries = torch.arange(end - len(query), end, device=positions.device)
        total = attention_received(query, key, of_queries, positions, options)
        if self.accumulate and received is not None:
            total[:, : received.shape[1]] += received
        places = kept_places(total, self.kept)
        return places, total.gather(1, places)


def _has_record(segments: Segments, record: Tensor) -> list[bool]:
    """Return for each segment whether its first token has a record; read once for all layers, as they are alike.

    A completion of one token has none, and needs none.
    """
    if "_has_eviction_record" not in segments.__dict__:
        known = record[:, 0].tolist()
        segments.__dict__["_has_eviction_record"] = [
            known[start] == 1 or (prefix >= 0 and length == 1)
            for start, prefix, length in zip(segments.starts, segments.prefixes, segments.lengths, strict=True)
        ]
    flags: list[bool] = segments.__dict__["_has_eviction_record"]
    return flags


def _first_of_token(segments: Segments) -> Tensor:
    """Return the place [N+1] of each token's sequence among the E, -1 for prompts and for padding; cached."""
    if "_first_of_token" not in segments.__dict__:
        firsts, end = [], 0
        for length, prefix in zip(segments.lengths, segments.prefixes, strict=True):
            firsts.append(-1 if prefix < 0 else end)
            end += 0 if prefix < 0 else segments.lengths[prefix] + length
        of_token = torch.tensor(firsts)[segments.on_host.segment_of_token]
        [segments.__dict__["_first_of_token"]] = to_device(
            [torch.nn.functional.pad(of_token, (0, 1), value=-1)], segments.device
        )
    first_of_token: Tensor = segments.__dict__["_first_of_token"]
    return first_of_token


def _hide_dropped(segments: Segments, drops: Tensor) -> Hide:
    """Return what hides the keys that a boundary before a query dropped.

    Args:
        drops: [K,E], the sequences of completions, in the order of their segments.
    """
    first_of_token = _first_of_token(segments)
    positions = torch.nn.functional.pad(segments.position_ids, (0, 1))

    def hide(scores: Tensor, block: Block) -> Tensor:
        """Set the scores [K,b,M,G,S] of dropped keys to -inf."""
        first = first_of_token[block.queries][..., None]
        places = (first + positions[block.keys][:, None]).clamp_(0, drops.shape[1] - 1)
        dropped = (drops[:, places] <= positions[block.queries][..., None]) & (first >= 0)
        return scores.masked_fill_(dropped[..., None, :], -torch.inf)

    return hide

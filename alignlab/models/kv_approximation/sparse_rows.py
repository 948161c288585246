"""Sparse rows of attention: which of the keys that a query sees it attends to.

The `recent` last tokens, the query's own included, are always attended to. Of the others, by their scores s after the
soft-cap, and with w the softmax of all that are seen,

    top-k                  the k largest
    a part of the largest  those with exp(s - max s) >= part, the maximum over all that are seen
    mass                   the fewest, the largest first, with which the sum of w reaches the mass

Each head chooses for itself. The scores of all keys are computed, and what is saved is the reading of values.

References: Gupta et al. (2021), arXiv:2106.06899, Section 3 (top-k); Tang et al. (2024), arXiv:2406.10774 (what sparse
reads save); Lin et al. (2025), Twilight, arXiv:2502.02770, Section 3 (mass).

Shapes: [..., S] rows of scores over S keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from alignlab.models.attention_plan import Block, batched_problems, blocks_on, make_block, query_runs
from alignlab.models.cache_spec import LayerCacheSpec
from alignlab.models.kv_approximation.choice_record import Choices, choices_of, recorded_choice
from alignlab.models.packed_attention import Hide, block_attention, in_autocast_dtype, packed_attention
from alignlab.models.sink_window import Window
from alignlab.types import Segments


@dataclass(frozen=True)
class SparseRows:
    """Keys and values of all tokens, of which a query attends to few. Layers with a window of their own are exact.

    Attributes:
        recent: last tokens that are always attended to, the query's own included.
        count: others, the k largest; None where another rule chooses.
        part: of the largest weight, that others must have; likewise.
        mass: that is attended to; likewise.
    """

    recent: int
    count: int | None = None
    part: float | None = None
    mass: float | None = None

    def is_sparse(self, spec: LayerCacheSpec) -> bool:
        """Return whether the rows of a layer are sparse."""
        return spec.window is None

    def chosen(self, scores: Tensor, is_recent: Tensor) -> Tensor:
        """Return which keys beside the recent ones each row attends to, [..., S] bool.

        Args:
            scores: -inf for keys that are not seen.
            is_recent: broadcasts to the scores.
        """
        others = scores.masked_fill(is_recent, -torch.inf)
        if self.count is not None:
            places = others.topk(min(self.count, others.shape[-1]), dim=-1).indices
            chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, places, True)
        elif self.part is not None:
            chosen = others >= scores.amax(-1, keepdim=True) + math.log(self.part)
        else:
            assert self.mass is not None
            weights = scores.softmax(-1)
            ranked, places = weights.masked_fill(is_recent, 0).sort(dim=-1, descending=True)
            before = ranked.cumsum(-1) - ranked + (weights * is_recent).sum(-1, keepdim=True)
            chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, places, before < self.mass)
        return chosen & (others > -torch.inf)

    def windows(self, spec: LayerCacheSpec) -> tuple[Window, ...]:
        """Return the window of a layer's tokens."""
        return (spec.window,)

    def block_bytes(self, spec: LayerCacheSpec, dtype: torch.dtype, block_size: int) -> dict[Window, int]:
        """Return the bytes of a block of a layer's tokens, by window, in a model of a dtype: with those of choices."""
        of_choices = 4 * spec.query_heads if self.is_sparse(spec) else 0
        return {spec.window: block_size * (dtype.itemsize * spec.token_numel + of_choices)}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, segments: Segments, record: Tensor | None = None,
        *, scaling: float, sliding_window: int | None, softcap: float | None, sinks: Tensor | None,
    ) -> Tensor:
        """Return packed attention of each query to the keys that it chooses, or chose; see `KVApproximation`."""
        if sliding_window is not None:
            return packed_attention(
                query, key, value, segments, scaling=scaling, sliding_window=sliding_window, softcap=softcap,
                sinks=sinks,
            )
        query, key, value = in_autocast_dtype(query, key, value)
        choices = None if record is None else choices_of(record, query.shape[1])
        return block_attention(
            query, key, value, row_blocks(segments), scaling=scaling, softcap=softcap, sinks=sinks,
            hide=self._hide(segments, choices, key.shape[1]),
        )

    def _hide(self, segments: Segments, choices: Choices | None, num_kv: int) -> Hide:
        """Return what hides the keys that queries leave out.

        Args:
            choices: [N,H], of the engine; None lets every query choose.
            num_kv: kv heads, K.
        """
        positions = torch.nn.functional.pad(segments.position_ids, (0, 1))  # of the padding too

        def hide(scores: Tensor, block: Block) -> Tensor:
            """Set scores [K,b,M,G,S] to -inf."""
            at_queries, at_keys = positions[block.queries][..., None], positions[block.keys][:, None]
            is_recent = (at_queries - at_keys < self.recent)[..., None, :].expand(scores.shape)
            chosen = self.chosen(scores, is_recent)
            if choices is not None:
                of_rows = choices.of_queries(block.queries, num_kv)
                at_keys = at_keys[..., None, :].expand(scores.shape)
                chosen = recorded_choice(chosen, scores.masked_fill(is_recent, -torch.inf), at_keys, of_rows)
            is_padding = (block.queries == segments.num_tokens)[..., None, None]
            return scores.masked_fill_(~(chosen | is_recent | is_padding), -torch.inf)

        return hide


def row_blocks(segments: Segments) -> list[Block]:
    """Return blocks in which each query meets all keys that it sees, its prompt's before its own; cached on `segments`.
    """
    if "_row_blocks" not in segments.__dict__:
        positions = segments.on_host.position_ids
        problems = []
        for start, length, prefix in zip(segments.starts, segments.lengths, segments.prefixes, strict=True):
            prompt = torch.arange(0)
            if prefix >= 0:
                prompt = torch.arange(segments.starts[prefix], segments.starts[prefix] + segments.lengths[prefix])
            tokens = torch.arange(start, start + length)
            for queries in query_runs(tokens, len(prompt)):
                problems.append((queries, torch.cat((prompt, tokens[: int(queries[-1]) + 1 - start]))))
        padding = (segments.num_tokens, segments.num_tokens)
        host = [
            make_block(batch, padding, lambda q, k: positions[k] <= positions[q], first=True)
            for batch in batched_problems(problems)
        ]
        segments.__dict__["_row_blocks"], _ = blocks_on(segments.device, host)
    blocks: list[Block] = segments.__dict__["_row_blocks"]
    return blocks

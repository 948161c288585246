"""A cache of which each query reads few tokens, and that keeps what each query chose.

Shapes: as in `paged_attention`; G heads share a kv head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from alignlab.models.kv_approximation.choice_record import packed_choices
from alignlab.models.kv_approximation.eviction_record import Evictions
from alignlab.models.kv_approximation.sparse_rows import SparseRows
from alignlab.rollout.embedded.block_pools import Window
from alignlab.rollout.embedded.paged_attention import PagedBatch, RowGroup, softmax_with_sinks
from alignlab.rollout.embedded.paged_cache import PagedCache

_CHOICES = "choices"


class SparseCache(PagedCache):
    """Beside the entries of a token it has the choices of its query in each head, under "choices"."""

    approximation: SparseRows
    """The rule of the choice."""

    def is_sparse(self, layer_idx: int) -> bool:
        """Return whether the queries of a layer read few tokens."""
        return self.approximation.is_sparse(self.specs[layer_idx])

    def write_choices(self, layer_idx: int, slots: Tensor, choices: Tensor) -> None:
        """Store the choices [N,H] int32 of the queries of a layer."""
        self._store(layer_idx, _CHOICES, slots, choices)

    def record(
        self, tables: Mapping[Window, list[int]], num_tokens: int, num_prompt: int, *, evictions: Evictions
    ) -> Tensor | None:
        """Return the choices of a sequence's queries; see `choice_record`."""
        rows = {}
        for layer_idx, tensors in self.layers.items():
            if _CHOICES in tensors:
                blocks = torch.tensor(tables[self.windows_of(layer_idx)[0]], device=tensors[_CHOICES].device)
                numbers = self.rows(layer_idx, _CHOICES, blocks, num_tokens)
                rows[layer_idx] = numbers.contiguous().view(torch.uint8)
        if not rows:
            return None
        first = next(iter(rows.values()))
        widest = max(row.shape[1] for row in rows.values())
        record = first.new_zeros(num_tokens, 1 + max(self.specs), 1 + widest)
        for layer_idx, row in rows.items():
            record[:, layer_idx, 0] = 1
            record[:, layer_idx, 1 : 1 + row.shape[1]] = row
        return record


class SparseBatch(PagedBatch):
    """The tokens of one step over a `SparseCache`; see `PagedBatch`."""

    _cache: SparseCache

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor | None,
        *, scaling: float, sliding_window: int | None, softcap: float | None, sinks: Tensor | None = None,
    ) -> Tensor:
        """Cache keys and values, attend to those that each query chooses, and cache the choices."""
        if not self._cache.is_sparse(layer_idx):
            return super().attend(
                layer_idx, query, key, value, scaling=scaling, sliding_window=sliding_window, softcap=softcap,
                sinks=sinks,
            )
        assert value is not None and sliding_window is None
        entries = {"key": key[0].transpose(0, 1), "value": value[0].transpose(0, 1)}
        exact = torch.promote_types(query.dtype, torch.float32)
        flat = query[0].transpose(0, 1).to(exact) * scaling
        outputs, choices = [], []
        for index, (group, cached) in enumerate(self.update(layer_idx, entries)):
            scores = self._scores(index, group, flat, cached["key"], softcap)
            chosen, is_recent = self._chosen(group, scores)
            positions = torch.arange(scores.shape[-1], device=scores.device)
            of_rows = packed_choices(chosen, positions)  # [R,K,G,Q]
            choices.append(group.unpadded(of_rows.permute(0, 3, 1, 2).flatten(2)))
            scores = scores.masked_fill_(~(chosen | is_recent), -torch.inf)
            of_heads = None if sinks is None else sinks.view(1, key.shape[1], -1, 1).expand(scores.shape[:-1])
            weights = softmax_with_sinks(scores, of_heads).to(value.dtype)
            mixed = weights.flatten(2, 3) @ cached["value"].transpose(1, 2)  # [R,K,G*Q,V]
            mixed = mixed.unflatten(2, scores.shape[2:4]).permute(0, 3, 1, 2, 4)
            outputs.append(group.unpadded(mixed.flatten(2, 3)))
        self._cache.write_choices(layer_idx, self._slots[None], torch.cat(choices))
        return torch.cat(outputs)[None]

    def _scores(self, index: int, group: RowGroup, flat: Tensor, key: Tensor, softcap: float | None) -> Tensor:
        """Return the scores [R,K,G,Q,L] of a group's queries, -inf for keys that are not seen.

        Args:
            flat: [N,H,D], scaled queries of the step, in the dtype of the scores.
            key: [R,L,K,D].
        """
        queries = group.queries(flat).unflatten(2, (key.shape[2], -1)).permute(0, 2, 3, 1, 4)  # [R,K,G,Q,D]
        scores = queries.flatten(2, 3) @ key.to(flat.dtype).permute(0, 2, 3, 1)
        scores = scores.unflatten(2, queries.shape[2:4])
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        return scores.masked_fill_(~self._visible(index, None)[:, :, None], -torch.inf)

    def _chosen(self, group: RowGroup, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return which keys beside the recent ones are chosen, and which are recent, [R,K,G,Q,L]."""
        keys = torch.arange(scores.shape[-1], device=scores.device)
        distances = group.positions[..., None] - keys  # [R,Q,L]
        rule = self._cache.approximation
        is_recent = ((distances >= 0) & (distances < rule.recent))[:, None, None].expand(scores.shape)
        return rule.chosen(scores, is_recent), is_recent

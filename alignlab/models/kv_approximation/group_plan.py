"""The cut of packed attention where old keys are rounded in groups: which group is made of which tokens, and who reads.

A group that a prompt ends within is another one in each completion. So rounded keys stand beside the exact ones, group
after group, each group with its G tokens: those of a shared prompt once, those of each completion after them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from alignlab.models.attention_plan import (
    MAX_SCORES,
    Block,
    Problem,
    batched_problems,
    blocks_on,
    make_block,
    query_runs,
)
from alignlab.types import Segments


@dataclass(frozen=True)
class GroupPlan:
    """Attention of N tokens to their N exact keys and to the rounded ones after them.

    Attributes:
        members: [M,G] int64, the token of each rounded key.
        blocks: of all visible pairs, each once; a key from N on is a rounded one.
    """

    members: Tensor
    blocks: list[Block]


def plan_groups(segments: Segments, window: int | None, group: int, recent: int) -> GroupPlan:
    """Return the plan of packed sequences; cached on `segments`.

    Args:
        window: a token sees this many tokens, itself included; None sees all.
        group: tokens of a group.
        recent: groups before a query's own that it meets exactly.
    """
    plans: dict[tuple[int | None, int, int], GroupPlan] = segments.__dict__.setdefault("_group_plans", {})
    if (window, group, recent) not in plans:
        plans[window, group, recent] = _Planner(segments, group, recent).plan(window)
    return plans[window, group, recent]


class _Planner:
    """Positions and places of the exact and the rounded keys of packed sequences, on the host."""

    def __init__(self, segments: Segments, group: int, recent: int) -> None:
        self.segments, self.group, self.recent = segments, group, recent
        self.positions = segments.on_host.position_ids
        self.members: list[Tensor] = []
        self.rounded: list[Tensor] = []
        """Of each segment, the keys of the groups that end within it."""
        num_keys = segments.num_tokens
        for index in range(len(segments.lengths)):
            groups = self._members(index)
            self.members.append(groups)
            self.rounded.append(torch.arange(num_keys, num_keys + groups.numel()))
            num_keys += groups.numel()
        self.num_keys = num_keys

    def plan(self, window: int | None) -> GroupPlan:
        """Return the plan."""
        members = torch.cat(self.members)
        key_positions = torch.cat((self.positions, self.positions[members.flatten()]))
        is_rounded = torch.arange(self.num_keys) >= self.segments.num_tokens

        def sees(queries: Tensor, keys: Tensor) -> Tensor:
            """Return [b,M,S] whether queries [b,M,1] see keys [b,1,S] of their own sequence."""
            q, k = self.positions[queries], key_positions[keys]
            is_old = k // self.group < q // self.group - self.recent
            visible = (k <= q) & (is_old == is_rounded[keys])
            return visible if window is None else visible & (q - k < window)

        blocks = [
            make_block(batch, (self.segments.num_tokens, self.num_keys), sees, first=first)
            for first, problems in (
                (True, self._own_exact()), (False, self._prompt_exact()), (False, self._own_rounded()),
                (False, self._prompt_rounded()),
            )
            for batch in batched_problems(list(problems))
        ]
        blocks, [members] = blocks_on(self.segments.device, blocks, [members])
        return GroupPlan(members, blocks)

    def _members(self, index: int) -> Tensor:
        """Return the tokens [groups, G] of the complete groups that end within a segment."""
        prefix, tokens = self.segments.prefixes[index], self._tokens(index)
        num_before = 0
        if prefix >= 0:
            num_before = self.segments.lengths[prefix]
            tokens = torch.cat((self._tokens(prefix)[num_before // self.group * self.group :], tokens))
        return tokens[: len(tokens) // self.group * self.group].view(-1, self.group)

    def _tokens(self, index: int) -> Tensor:
        start = self.segments.starts[index]
        return torch.arange(start, start + self.segments.lengths[index])

    def _first_exact(self, queries: Tensor) -> int:
        """Return the first position that the earliest of some queries, which rise, meets exactly."""
        return (int(self.positions[queries[0]]) // self.group - self.recent) * self.group

    def _own_exact(self) -> Iterator[Problem]:
        """Yield each segment against its own exact keys."""
        for index in range(len(self.segments.lengths)):
            tokens = self._tokens(index)
            for queries in query_runs(tokens):
                end = int(queries[-1]) + 1 - int(tokens[0])
                yield queries, tokens[max(0, self._first_exact(queries) - int(self.positions[tokens[0]])) : end]

    def _prompt_exact(self) -> Iterator[Problem]:
        """Yield the first queries of each completion against the end of its prompt."""
        for index, prefix in enumerate(self.segments.prefixes):
            if prefix < 0:
                continue
            prompt, tokens = self._tokens(prefix), self._tokens(index)
            last_group = (len(prompt) - 1) // self.group + self.recent
            queries = tokens[self.positions[tokens] // self.group <= last_group]
            if len(queries):
                yield queries, prompt[max(0, self._first_exact(queries)) :]

    def _own_rounded(self) -> Iterator[Problem]:
        """Yield each segment against the rounded keys of the groups that end within it."""
        for index, keys in enumerate(self.rounded):
            for queries in query_runs(self._tokens(index)) if len(keys) else ():
                first_group = int(self.positions[self.members[index][0, -1]]) // self.group
                last_group = int(self.positions[queries[-1]]) // self.group - self.recent - 1
                num_keys = (last_group - first_group + 1) * self.group
                if num_keys > 0:
                    yield queries, keys[:num_keys]

    def _prompt_rounded(self) -> Iterator[Problem]:
        """Yield the queries of all completions of a prompt against its rounded keys."""
        children: dict[int, list[Tensor]] = {}
        for index, prefix in enumerate(self.segments.prefixes):
            if prefix >= 0 and len(self.rounded[prefix]):
                children.setdefault(prefix, []).append(self._tokens(index))
        for prefix, completions in children.items():
            keys = self.rounded[prefix]
            for queries in torch.cat(completions).split(max(1, MAX_SCORES // len(keys))):
                yield queries, keys

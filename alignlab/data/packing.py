"""Rollouts and examples cut into flat packs under a token budget.

Shapes: N tokens of one pack, L MoE layers, K experts a token. There is no padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignlab.data.examples import Example
from alignlab.errors import DataError
from alignlab.types import Completion, Experience, Rollout, Segments


@dataclass(frozen=True)
class _Branch:
    """One completion and the sequence of the optimizer step that it ends."""

    sequence_id: int
    completion: Completion

    @property
    def num_tokens(self) -> int:
        return len(self.completion.token_ids)


@dataclass(frozen=True)
class _Unit:
    """What is never divided among packs: a prompt with the completions that are computed together with it."""

    group_id: int
    prompt: tuple[int, ...]
    branches: tuple[_Branch, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + sum(branch.num_tokens for branch in self.branches)


def pack_rollouts(rollouts: Sequence[Rollout], *, budget: int, share_prefix: bool = True) -> list[Experience]:
    """Packs of at most `budget` tokens, few and of about equal size.

    Sequence ids run over all completions of all rollouts in order, those of no tokens included, which are in no pack.
    The group id of a completion is the index of its rollout. A group that is over the budget is divided, and its
    prompt repeated; a single completion that is over it with its prompt gets a pack of its own.

    Args:
        rollouts: what the engine returned.
        budget: tokens of a pack, >= 1.
        share_prefix: one prompt segment, on which the completions of its group hang; otherwise each completion is a
            root of its own, prompt and completion in one segment.

    Returns:
        Packs with `rollout_logprobs`, and with `routing` where the completions carry it: the prompt's rows are those
        that the first of its completions in the pack recorded.

    Raises:
        DataError: a prompt without tokens, which leaves nothing to predict a completion's first token from.
    """
    assert budget >= 1
    units: list[_Unit] = []
    next_id = 0
    for group_id, rollout in enumerate(rollouts):
        if not rollout.prompt.token_ids:
            raise DataError(
                f"a prompt must have at least one token, and prompt {rollout.prompt.index} has none; "
                "drop the row, or give it a system prompt or a beginning-of-sequence token"
            )
        branches = [_Branch(next_id + i, completion) for i, completion in enumerate(rollout.completions)]
        next_id += len(branches)
        filled = [branch for branch in branches if branch.num_tokens]
        units += _units_of_group(group_id, rollout.prompt.token_ids, filled, budget, share_prefix)
    bins = balanced_bins([unit.num_tokens for unit in units], budget)
    return [_rollout_pack([units[i] for i in members], share_prefix) for members in bins]


def pack_groups(rollouts: Sequence[Rollout], *, budget: int) -> list[Experience]:
    """As `pack_rollouts`, but no group is divided: one that is over the budget gets a pack of its own.

    For losses of several completions of one prompt together.
    """
    units: list[_Unit] = []
    next_id = 0
    for group_id, rollout in enumerate(rollouts):
        branches = tuple(_Branch(next_id + i, completion) for i, completion in enumerate(rollout.completions))
        next_id += len(branches)
        assert rollout.prompt.token_ids and all(branch.num_tokens for branch in branches)
        units.append(_Unit(group_id, rollout.prompt.token_ids, branches))
    bins = balanced_bins([unit.num_tokens for unit in units], budget)
    return [_rollout_pack([units[i] for i in members], share_prefix=True) for members in bins]


def pack_examples(examples: Sequence[Example], *, budget: int) -> list[Experience]:
    """Packs of at most `budget` tokens; each example is a root whose sequence id is its index.

    An example that is over the budget gets a pack of its own.
    """
    assert budget >= 1
    packs = []
    for members in balanced_bins([len(example.token_ids) for example in examples], budget):
        chosen = [examples[i] for i in members]
        segments = Segments(
            lengths=tuple(len(example.token_ids) for example in chosen),
            prefixes=(-1,) * len(members),
            sequence_ids=tuple(members),
            group_ids=tuple(members),
        )
        tokens = torch.tensor([token for example in chosen for token in example.token_ids], dtype=torch.long)
        mask = torch.tensor([kept for example in chosen for kept in example.completion_mask], dtype=torch.bool)
        packs.append(Experience(tokens=tokens, segments=segments, completion_mask=mask))
    return packs


def balanced_bins(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `sizes` in bins of at most `capacity`; an item over the capacity is alone in its bin.

    First-fit-decreasing says how many bins it takes. The same number is then filled by giving each item, from the
    largest on, to the emptiest bin; that evens them out, and is kept where it holds the capacity too.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    alone = [[i] for i in order if sizes[i] >= capacity]
    rest = [i for i in order if sizes[i] < capacity]
    fitted = _first_fit(rest, sizes, capacity)
    levelled = _emptiest_first(rest, sizes, len(fitted))
    fits = all(sum(sizes[i] for i in members) <= capacity for members in levelled)
    return sorted(sorted(members) for members in alone + (levelled if fits else fitted))


def _first_fit(order: Sequence[int], sizes: Sequence[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for i in order:
        place = next((b for b, free in enumerate(room) if free >= sizes[i]), None)
        if place is None:
            place = len(bins)
            bins.append([])
            room.append(capacity)
        bins[place].append(i)
        room[place] -= sizes[i]
    return bins


def _emptiest_first(order: Sequence[int], sizes: Sequence[int], num_bins: int) -> list[list[int]]:
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [0] * num_bins
    for i in order:
        place = min(range(num_bins), key=loads.__getitem__)
        bins[place].append(i)
        loads[place] += sizes[i]
    return bins


def _units_of_group(
    group_id: int, prompt: tuple[int, ...], branches: Sequence[_Branch], budget: int, share_prefix: bool
) -> list[_Unit]:
    """The group as one unit where it fits the budget, else as several that repeat the prompt."""
    if not share_prefix:
        return [_Unit(group_id, prompt, (branch,)) for branch in branches]
    bins = balanced_bins([branch.num_tokens for branch in branches], max(budget - len(prompt), 1))
    return [_Unit(group_id, prompt, tuple(branches[i] for i in members)) for members in bins]


@dataclass(frozen=True)
class _Run:
    """A stretch of a pack: a prompt's tokens (`branch` None) or a completion's, and the completion it belongs to."""

    token_ids: tuple[int, ...]
    owner: Completion
    first_row: int
    branch: _Branch | None

    @property
    def rollout_logprobs(self) -> tuple[float, ...]:
        return self.branch.completion.logprobs if self.branch else (0.0,) * len(self.token_ids)

    @property
    def completion_mask(self) -> tuple[bool, ...]:
        if self.branch is None:
            return (False,) * len(self.token_ids)
        return self.branch.completion.own or (True,) * len(self.token_ids)

    @property
    def routing(self) -> Tensor | None:
        """The owner's record of these tokens, [tokens of the run, L, K]."""
        if self.owner.routing is None:
            return None
        return self.owner.routing[self.first_row : self.first_row + len(self.token_ids)]


def _runs(units: Sequence[_Unit], share_prefix: bool) -> list[_Run]:
    runs: list[_Run] = []
    for unit in units:
        for position, branch in enumerate(unit.branches):
            if position == 0 or not share_prefix:
                runs.append(_Run(unit.prompt, branch.completion, 0, None))
            runs.append(_Run(branch.completion.token_ids, branch.completion, len(unit.prompt), branch))
    return runs


def _segments(units: Sequence[_Unit], share_prefix: bool) -> Segments:
    rows: list[tuple[int, int, int, int]] = []
    for unit in units:
        if not share_prefix:
            rows += [
                (len(unit.prompt) + branch.num_tokens, -1, branch.sequence_id, unit.group_id)
                for branch in unit.branches
            ]
            continue
        root = len(rows)
        rows.append((len(unit.prompt), -1, -1, unit.group_id))
        rows += [(branch.num_tokens, root, branch.sequence_id, unit.group_id) for branch in unit.branches]
    lengths, prefixes, sequence_ids, group_ids = zip(*rows, strict=True)
    return Segments(lengths=lengths, prefixes=prefixes, sequence_ids=sequence_ids, group_ids=group_ids)


def _rollout_pack(units: Sequence[_Unit], share_prefix: bool) -> Experience:
    runs = _runs(units, share_prefix)
    for run in runs:
        assert len(run.rollout_logprobs) == len(run.token_ids), "a completion has one log-prob a token"
    return Experience(
        tokens=torch.tensor([token for run in runs for token in run.token_ids], dtype=torch.long),
        segments=_segments(units, share_prefix),
        completion_mask=torch.tensor([is_own for run in runs for is_own in run.completion_mask]),
        rollout_logprobs=torch.tensor([x for run in runs for x in run.rollout_logprobs], dtype=torch.float32),
        routing=_routing(runs),
    )


def _routing(runs: Sequence[_Run]) -> Tensor | None:
    """[N, L, K] int16, -1 where a completion has no record; None where none has."""
    recorded = next((run.owner.routing for run in runs if run.owner.routing is not None), None)
    if recorded is None:
        return None
    layers, experts = recorded.shape[1:]
    parts = []
    for run in runs:
        rows = run.routing
        if rows is None:
            rows = torch.full((len(run.token_ids), layers, experts), -1, dtype=torch.int16)
        assert rows.shape == (len(run.token_ids), layers, experts), "routing has one row a token"
        parts.append(rows.to(device="cpu", dtype=torch.int16))
    return torch.cat(parts)

"""Packing: rollouts and examples become flat packs of tokens under a token budget.

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
    """A completion and the index of its sequence in the optimizer step."""

    sequence_id: int
    completion: Completion

    @property
    def num_tokens(self) -> int:
        return len(self.completion.token_ids)


@dataclass(frozen=True)
class _Unit:
    """A prompt with completions that are in the same pack."""

    group_id: int
    prompt: tuple[int, ...]
    branches: tuple[_Branch, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + sum(branch.num_tokens for branch in self.branches)


def pack_rollouts(rollouts: Sequence[Rollout], *, budget: int, share_prefix: bool = True) -> list[Experience]:
    """Return packs of at most `budget` tokens, few and of about equal size; the mask holds the policy's tokens alone.

    Sequence ids count all completions of all rollouts in order; completions without tokens are in no pack. The group
    id of a completion is the index of its rollout. A group over the budget is divided, and its prompt repeated; a
    single completion that is over the budget with its prompt gets a pack for itself.

    Args:
        rollouts: one or more completions of each prompt.
        budget: largest number of tokens in a pack, >= 1.
        share_prefix: put each prompt into one segment that is the prefix of its completions' segments; otherwise each
            completion is a root, prompt and completion in one segment.

    Returns:
        Packs with `rollout_logprobs`, and with `routing` and `kv_record` if the completions have them: the rows of a
        shared prompt are those that its first completion of several tokens in the pack recorded. Completions whose
        prompt was computed with other experts dropped do not share it.

    Raises:
        DataError: a prompt has no tokens, so that nothing predicts a completion's first token.
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
        for alike in _of_one_prompt_record(filled, len(rollout.prompt.token_ids)):
            units += _units_of_group(group_id, rollout.prompt.token_ids, alike, budget, share_prefix)
    bins = balanced_bins([unit.num_tokens for unit in units], budget)
    return [_rollout_pack([units[i] for i in members], share_prefix) for members in bins]


def pack_groups(rollouts: Sequence[Rollout], *, budget: int) -> list[Experience]:
    """Return packs as `pack_rollouts` does, but with whole groups: a group over the budget gets a pack for itself.

    For losses that compare completions of one prompt.
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
    """Return packs of at most `budget` tokens; each example is a root whose sequence id is its index.

    An example over the budget gets a pack for itself.
    """
    assert budget >= 1
    packs = []
    for members in balanced_bins([len(example.token_ids) for example in examples], budget):
        packed = [examples[i] for i in members]
        segments = Segments(
            lengths=tuple(len(example.token_ids) for example in packed),
            prefixes=(-1,) * len(members),
            sequence_ids=tuple(members),
            group_ids=tuple(members),
        )
        tokens = torch.tensor([token for example in packed for token in example.token_ids], dtype=torch.long)
        mask = torch.tensor([bit for example in packed for bit in example.completion_mask], dtype=torch.bool)
        packs.append(Experience(tokens=tokens, segments=segments, completion_mask=mask))
    return packs


def balanced_bins(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the indices of `sizes` in bins of at most `capacity`; an item over the capacity gets a bin for itself.

    First-fit-decreasing finds the number of bins. As many bins are then filled evenly, by putting each item, largest
    first, into the emptiest bin; that result is returned if no bin exceeds the capacity.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    single = [[i] for i in order if sizes[i] >= capacity]
    small = [i for i in order if sizes[i] < capacity]
    fitted = _first_fit(small, sizes, capacity)
    even = _emptiest_first(small, sizes, len(fitted))
    is_even_allowed = all(sum(sizes[i] for i in members) <= capacity for members in even)
    return sorted(sorted(members) for members in single + (even if is_even_allowed else fitted))


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


def _of_one_prompt_record(branches: Sequence[_Branch], prompt_tokens: int) -> list[list[_Branch]]:
    """Return the branches in lists within which the prompt was computed with the same choices of experts dropped.

    A prompt that an engine computes twice, in steps with other tokens, drops other choices (-2 or below) each time.
    """
    lists: dict[bytes, list[_Branch]] = {}
    for branch in branches:
        routing = branch.completion.routing
        rows = None if routing is None else routing[:prompt_tokens]
        drops = b"" if rows is None or not bool((rows < -1).any()) else rows.cpu().numpy().tobytes()
        lists.setdefault(drops, []).append(branch)
    return list(lists.values())


def _units_of_group(
    group_id: int, prompt: tuple[int, ...], branches: Sequence[_Branch], budget: int, share_prefix: bool
) -> list[_Unit]:
    """Return the group as one unit if it fits the budget, else as several units that repeat the prompt."""
    if not share_prefix:
        return [_Unit(group_id, prompt, (branch,)) for branch in branches]
    bins = balanced_bins([branch.num_tokens for branch in branches], max(budget - len(prompt), 1))
    return [_Unit(group_id, prompt, tuple(branches[i] for i in members)) for members in bins]


@dataclass(frozen=True)
class _Run:
    """A contiguous part of a pack: the tokens of a prompt or of a completion.

    Attributes:
        token_ids: its tokens.
        owner: completion whose records cover the tokens.
        first_row: row of the first token in these records.
        branch: the completion; None for a prompt.
    """

    token_ids: tuple[int, ...]
    owner: Completion
    first_row: int
    branch: _Branch | None

    @property
    def rollout_logprobs(self) -> tuple[float, ...]:
        if self.branch is None:
            return (0.0,) * len(self.token_ids)
        completion = self.branch.completion
        by_policy = zip(completion.logprobs, completion.policy_tokens, strict=True)
        return tuple(logprob if is_policy else 0.0 for logprob, is_policy in by_policy)

    @property
    def completion_mask(self) -> tuple[bool, ...]:
        if self.branch is None:
            return (False,) * len(self.token_ids)
        return self.branch.completion.policy_tokens

    def rows(self, name: str) -> Tensor | None:
        """Return the rows [tokens, ...] of these tokens in the owner's record of a name; None without that record."""
        record: Tensor | None = getattr(self.owner, name)
        if record is None:
            return None
        return record[self.first_row : self.first_row + len(self.token_ids)]


def _runs(units: Sequence[_Unit], share_prefix: bool) -> list[_Run]:
    runs: list[_Run] = []
    for unit in units:
        # One of a single token ended before a cache with a budget dropped tokens of the prompt.
        longer = (branch for branch in unit.branches if branch.num_tokens > 1)
        first = next(longer, unit.branches[0])
        for position, branch in enumerate(unit.branches):
            if position == 0 or not share_prefix:
                runs.append(_Run(unit.prompt, (first if share_prefix else branch).completion, 0, None))
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
    return Experience(
        tokens=torch.tensor([token for run in runs for token in run.token_ids], dtype=torch.long),
        segments=_segments(units, share_prefix),
        completion_mask=torch.tensor([is_policy for run in runs for is_policy in run.completion_mask]),
        rollout_logprobs=torch.tensor([x for run in runs for x in run.rollout_logprobs], dtype=torch.float32),
        routing=_record(runs, "routing", torch.int16, missing=-1),
        kv_record=_record(runs, "kv_record", torch.uint8, missing=0),
    )


def _record(runs: Sequence[_Run], name: str, dtype: torch.dtype, *, missing: int) -> Tensor | None:
    """Return the records of a name [N, ...]; None if no completion has one.

    Args:
        missing: fills the rows of a completion without a record.
    """
    of_runs = [run.rows(name) for run in runs]
    shape = next((rows.shape[1:] for rows in of_runs if rows is not None), None)
    if shape is None:
        return None
    blocks = []
    for run, rows in zip(runs, of_runs, strict=True):
        if rows is None:
            rows = torch.full((len(run.token_ids), *shape), missing, dtype=dtype)
        assert rows.shape == (len(run.token_ids), *shape), f"{name} has one row a token"
        blocks.append(rows.to(device="cpu", dtype=dtype))
    return torch.cat(blocks)

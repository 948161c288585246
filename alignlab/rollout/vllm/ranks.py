"""The ranks of a training that use vLLM: what they do one after another, and what together.

What they tell each other travels in the host's memory by gloo: by NCCL, a flag would wait for all work of the GPU.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch

from alignlab.errors import RolloutError
from alignlab.rollout.vllm.weight_group import BroadcastBroken

_LONGEST_UPDATE = timedelta(hours=24)
"""Limit on the wait for the first rank to send weights; not meant to act, as the ranks' watchdog ends a lost rank."""
_FAILED, _AGAIN, _SUCCEEDED = range(3)
_Group = torch.distributed.ProcessGroup
_host_groups: dict[_Group, _Group] = {}  # by the group of all ranks
_neighbours: dict[tuple[_Group, int], _Group] = {}  # by the group of all ranks, and their number


def this_rank() -> int:
    """Return this process's rank; 0 where there is one process."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def has_several_ranks() -> bool:
    """Return whether the training has several ranks."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


@contextmanager
def first_rank_first(meanwhile: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Run the body on the first rank, then on the others; every rank enters it together.

    Args:
        meanwhile: what the others do while the first rank is in its body.

    Raises:
        RolloutError: on the other ranks, without running their body: the first rank's body raised.
        BroadcastBroken: the same, and the first rank raised it too.
    """
    if this_rank() > 0:
        meanwhile()
        outcome = _smallest_of_ranks(_SUCCEEDED)
        if outcome == _AGAIN:
            raise BroadcastBroken("see the first rank's message")
        if outcome == _FAILED:
            raise RolloutError("the first rank could not update vLLM's weights; see its message")
        yield
        return
    outcome = _FAILED
    try:
        yield
        outcome = _SUCCEEDED
    except BroadcastBroken:
        outcome = _AGAIN
        raise
    finally:
        _smallest_of_ranks(outcome)  # the others wait for this


@contextmanager
def together(work: str, group: _Group | None = None) -> Iterator[None]:
    """Run the body on all ranks at once; every rank enters it together.

    Args:
        work: what the body does, for the message.
        group: the ranks, for tensors in the host's memory; default: all.

    Raises:
        RolloutError: the body raised on another rank.
    """
    outcome = _FAILED
    try:
        yield
        outcome = _SUCCEEDED
    finally:
        outcome_of_all = _smallest_of_ranks(outcome, group)
    if outcome_of_all != _SUCCEEDED:
        raise RolloutError(f"another rank could not {work}; see its message")


def largest_of_ranks(number: int, group: _Group | None = None) -> int:
    """Return the largest of the ranks' numbers; every rank calls this together.

    Args:
        group: see `together`.
    """
    if not torch.distributed.is_initialized():
        return number
    value = torch.tensor(number)
    torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX, group=group or _host_group())
    return int(value)


def neighbours(size: int) -> _Group:
    """Return the group of `size` consecutive ranks that this rank is in, for tensors in the host's memory.

    The first call is collective over all ranks.
    """
    world = torch.distributed.group.WORLD
    assert world is not None
    if (world, size) not in _neighbours:
        for first in range(0, torch.distributed.get_world_size(), size):
            members = list(range(first, first + size))
            group = torch.distributed.new_group(members, backend="gloo", timeout=_LONGEST_UPDATE)
            if this_rank() in members:
                _neighbours[world, size] = cast(_Group, group)
    return _neighbours[world, size]


def gather_json(value: Any, group: _Group) -> list[Any]:
    """Return the value of each rank of a group, which JSON must hold exactly; all call this together."""
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    count = torch.distributed.get_world_size(group)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(count)]
    torch.distributed.all_gather(lengths, torch.tensor([len(content)]), group=group)
    padded = torch.zeros(max(map(int, lengths)), dtype=torch.uint8)
    padded[: len(content)] = content
    contents = [torch.empty_like(padded) for _ in range(count)]
    torch.distributed.all_gather(contents, padded, group=group)
    return [
        json.loads(bytes(part[: int(length)].numpy())) for part, length in zip(contents, lengths, strict=True)
    ]


def shared_random_name() -> str:
    """Return 16 random hexadecimal digits, the same on all ranks, which call this together."""
    number = torch.tensor(secrets.randbits(62))
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(number, 0, group=_host_group())
    return f"{int(number):016x}"


def _smallest_of_ranks(number: int, group: _Group | None = None) -> int:
    """Return the smallest of the ranks' numbers; every rank calls this together."""
    return -largest_of_ranks(-number, group)


def _host_group() -> _Group:
    """Return a group of all ranks for tensors in the host's memory; the first call is collective."""
    world = torch.distributed.group.WORLD
    assert world is not None
    if torch.distributed.get_backend(world) == "gloo":
        return world
    if world not in _host_groups:
        group = torch.distributed.new_group(backend="gloo", timeout=_LONGEST_UPDATE)
        _host_groups[world] = cast(_Group, group)
    return _host_groups[world]

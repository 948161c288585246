"""The ranks of a training that share vLLM's servers: the first one sends weights for all."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from alignlab.errors import RolloutError


def this_rank() -> int:
    """Return this process's rank; 0 where there is one process."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


@contextmanager
def first_rank_first(device: torch.device) -> Iterator[None]:
    """Run the body on the first rank, then on the others; every rank enters it together.

    Raises:
        RolloutError: on the other ranks, without running their body: the first rank's body raised.
    """
    if this_rank() > 0:
        if not _on_all_ranks(True, device):
            raise RolloutError("the first rank could not update vLLM's weights; see its message")
        yield
        return
    succeeded = False
    try:
        yield
        succeeded = True
    finally:
        _on_all_ranks(succeeded, device)  # the others wait for this


def shared_random_name(device: torch.device) -> str:
    """Return 16 random hexadecimal digits, the same on all ranks."""
    number = torch.tensor(secrets.randbits(62), device=device)
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(number, 0)
    return f"{int(number):016x}"


def _on_all_ranks(flag: bool, device: torch.device) -> bool:
    """Return True if the flag is True on every rank."""
    if not torch.distributed.is_initialized():
        return flag
    value = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MIN)
    return bool(value)

"""Groups of consecutive ranks that share one vLLM, whose parts are in their processes (`rollout.tensor_parallel`).

Each rank of a group has an engine of vLLM's with one worker, which holds a part of the model. The engines schedule by
themselves, and must be given the same requests in the same order. So the ranks of a group gather their requests, all
generate all of them, and each keeps the answers to its own.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from alignlab.config.rollout import EngineSettings, VLLMSettings
from alignlab.errors import ConfigError
from alignlab.rollout.vllm.completions import Request
from alignlab.rollout.vllm.ranks import (
    gather_json,
    has_several_ranks,
    largest_of_ranks,
    neighbours,
    this_rank,
    together,
)

_FIXES = "use 1, start one process, or use rollout.engine: vllm_server"


def shares_vllm(settings: EngineSettings) -> bool:
    """Return True if several ranks of this training share one vLLM in their processes."""
    return isinstance(settings, VLLMSettings) and settings.tensor_parallel > 1 and has_several_ranks()


def check_groups(settings: EngineSettings) -> None:
    """Raise unless the ranks of this training can form groups that share one vLLM each.

    Raises:
        ConfigError: `tensor_parallel` does not divide the number of ranks.
    """
    if not shares_vllm(settings):
        return
    assert isinstance(settings, VLLMSettings)
    size, num_ranks = settings.tensor_parallel, torch.distributed.get_world_size()
    if num_ranks % size:
        raise ConfigError(
            f"rollout.tensor_parallel is {size}, and must divide the number of ranks ({num_ranks}), of which each "
            f"{size} share one vLLM; {_FIXES}"
        )


def require_own_vllm(settings: EngineSettings, work: str) -> None:
    """Raise if several ranks share one vLLM for work in which each rank samples as often as it needs.

    Args:
        work: name of the work, for the message.

    Raises:
        ConfigError: they do.
    """
    if shares_vllm(settings):
        assert isinstance(settings, VLLMSettings)
        raise ConfigError(
            f"rollout.tensor_parallel is {settings.tensor_parallel}, and must be 1 for {work} on several ranks, which "
            f"sample at their own pace and cannot share one vLLM; {_FIXES}"
        )


class RankGroup:
    """The ranks that share one vLLM with this rank. Every rank of the training makes it together.

    Args:
        size: number of its ranks.

    Raises:
        ConfigError: a group of ranks is on several machines.
    """

    def __init__(self, size: int) -> None:
        self._size, self._group = size, neighbours(size)
        # Asked, because vLLM overwrites the launcher's LOCAL_WORLD_SIZE.
        num_machines = len(set(gather_json(socket.gethostname(), self._group)))
        if largest_of_ranks(num_machines) > 1:
            raise ConfigError(
                f"rollout.tensor_parallel is {size}, and must divide the number of ranks on each machine: ranks that "
                f"share one vLLM must be on one machine; {_FIXES}"
            )

    def agreed(self) -> AbstractContextManager[None]:
        """Return a context, entered by the ranks of the group together, that raises on all if it raises on one."""
        return together("prepare its requests to the vLLM that it shares with this one", group=self._group)

    def gathered(self, requests: Sequence[Request]) -> tuple[list[Request], slice]:
        """Return the requests of all ranks of the group, and the place of this rank's among them."""
        of_ranks = gather_json([[request.token_ids, request.params] for request in requests], self._group)
        start = sum(map(len, of_ranks[: this_rank() % self._size]))
        everything = [Request(tuple(ids), params) for rows in of_ranks for ids, params in rows]
        return everything, slice(start, start + len(requests))


@contextmanager
def own_shared_memory(name: str) -> Iterator[None]:
    """Let the vLLMs that are made within the context name their memory on a CPU so that no other training has it.

    Without this, vLLM 0.32 names the memory that its parts share by the numbers of their ranks alone, and two trainings
    of one machine could take each other's.

    Args:
        name: random, and equal on all ranks.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    own: Any = _CPUSHMDistributed.make_group_name

    def make_group_name(communicator: Any) -> str:
        return f"{name}-{own(communicator).replace('/', '')}"

    _CPUSHMDistributed.make_group_name = staticmethod(make_group_name)
    try:
        yield
    finally:
        _CPUSHMDistributed.make_group_name = staticmethod(own)

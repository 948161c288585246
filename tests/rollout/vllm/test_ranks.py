"""The first rank of a training sends weights before the others use them, and tells them if it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.errors import RolloutError
from alignlab.rollout.vllm import ranks
from alignlab.rollout.vllm.ranks import first_rank_first, largest_of_ranks, shared_random_name, together
from alignlab.rollout.vllm.weight_group import BroadcastBroken


def run_rank(rank: int, folder: Path, backend: str) -> None:
    """Enter two bodies, of which the first one raises on rank 0; write what happened to a file."""
    rendezvous = f"file://{folder / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    torch.distributed.get_backend = lambda group: backend
    events: list[Any] = []
    for body in ("raises", "succeeds"):
        try:
            with first_rank_first(lambda: events.append("meanwhile")):
                events.append(body)
                if rank == 1:
                    assert (folder / f"{body}-0").exists(), "rank 1 runs its body before rank 0 has ended its own"
                (folder / f"{body}-{rank}").touch()
                if body == "raises":
                    raise ValueError
        except (ValueError, RolloutError) as error:
            events.append(type(error).__name__)
    try:
        with first_rank_first():
            events.append("sends")
            raise BroadcastBroken("a server died")
    except BroadcastBroken as error:
        events.append(str(error).rpartition(": ")[2])
    for failing_rank in (0, 1, 2):
        try:
            with together("do it"):
                if rank == failing_rank:
                    raise ValueError
            events.append("all")
        except (ValueError, RolloutError) as error:
            events.append(str(error) or "own error")
    events.append(largest_of_ranks(3 + rank))
    own_group = ranks._host_group() is not torch.distributed.group.WORLD
    assert ranks._host_group() is ranks._host_group()
    result = {"events": events, "name": shared_random_name(), "own_group": own_group}
    (folder / f"{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_the_first_rank_comes_first_and_its_error_reaches_the_others(backend: str, tmp_path: Path) -> None:
    """By a group of gloo beside one of NCCL, which takes no tensors in the host's memory."""
    torch.multiprocessing.spawn(run_rank, (tmp_path, backend), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    other = "another rank could not do it; see its message"
    again = ["a server died"], ["see the first rank's message"]
    assert first["events"] == [
        "raises", "ValueError", "succeeds", "sends", *again[0], "own error", other, "all", 4,
    ]  # fmt: skip
    assert second["events"] == [
        "meanwhile", "RolloutError", "meanwhile", "succeeds", *again[1], other, "own error", "all", 4,
    ]  # fmt: skip
    assert first["name"] == second["name"] and len(first["name"]) == 16
    assert first["own_group"] == second["own_group"] == (backend == "nccl")


def test_one_process_needs_no_process_group() -> None:
    def fail() -> Any:
        with first_rank_first():
            raise ValueError

    with first_rank_first():
        pass
    with pytest.raises(ValueError):
        fail()
    assert shared_random_name() != shared_random_name()

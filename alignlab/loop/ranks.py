"""The ranks of a run, and what they tell each other beside gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from alignlab.loop.rank_agreement import RankAgreement, gather_bytes, json_of_ranks

T = TypeVar("T")


class Ranks:
    """This process among the processes of a run. Methods that communicate are called by every rank together.

    Args:
        accelerator: device and process group.

    Attributes:
        index: of this rank, from 0 on.
        count: of ranks.
        device: of this rank.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.index, self.count = int(accelerator.process_index), int(accelerator.num_processes)
        self.device: torch.device = accelerator.device

    @property
    def is_main(self) -> bool:
        """Return whether this rank writes files and shows progress."""
        return self.index == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's part of some items: every `count`-th, from `index` on."""
        return items[self.index :: self.count]

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks, on this rank's device."""
        total: Tensor = self.accelerator.reduce(value.to(self.device), reduction="sum")
        return total

    def sum_number(self, value: float) -> float:
        """Return the sum of a number over all ranks."""
        return float(self.sum(torch.tensor(value, dtype=torch.float64)))

    def largest(self, number: int) -> int:
        """Return the largest of the ranks' numbers."""
        return int(self.gather(torch.tensor([number])).max())

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set on any rank."""
        return self.sum_number(float(flag)) > 0

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all ranks, in the order of the ranks, on the host."""
        all_rows: Tensor = self.accelerator.gather(rows.to(self.device))
        return all_rows.cpu()

    def gather_json(self, value: Any) -> list[Any]:
        """Return the value of each rank, which JSON must hold exactly."""
        return json_of_ranks(self.accelerator, value)

    def gather_done(self, work: str, compute: Callable[[], Any]) -> list[Any]:
        """Return what each rank computes, which JSON must hold exactly.

        Args:
            work: name of the work, for the message.
            compute: this rank's part, in which it waits for no other rank.

        Raises:
            RankError: another rank has failed; this one raises its own error.
        """
        with RankAgreement(self.accelerator)(work):
            value = compute()
        return self.gather_json(value) if self.count > 1 else [value]

    def of_main(self, text: str) -> str:
        """Return the text of rank 0."""
        return gather_bytes(self.accelerator, text.encode())[0].decode()

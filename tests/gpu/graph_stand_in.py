"""A stand-in for recorded CUDA graphs, where there is no GPU: it computes again, on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from alignlab.rollout.embedded import replays


class Rerun:
    """Stands for a recorded graph: it reads the tensors that it was made with, and has one output.

    Attributes:
        made: all of them, in the order in which they were recorded.
    """

    made: list[Rerun] = []  # noqa: RUF012

    def __init__(self, work: Callable[[], Tensor], pool: Any) -> None:
        self._work, self.pool, self.times = work, pool, 0
        self._output = work()
        Rerun.made.append(self)

    def __call__(self) -> Tensor:
        self.times += 1
        self._output.copy_(self._work())
        return self._output


def pretend_recording(monkeypatch: pytest.MonkeyPatch) -> list[Rerun]:
    """Let stand-ins be recorded in place of CUDA graphs; return the list that they will stand in."""
    monkeypatch.setattr(replays, "record", Rerun)
    monkeypatch.setattr(replays, "new_pool", object)
    monkeypatch.setattr(Rerun, "made", [])
    return Rerun.made

"""A stand-in for recorded CUDA graphs, where there is no GPU: it computes again, on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from alignlab.rollout.embedded import replays


class Rerun:
    """Stands for a recorded graph: it reads the tensors that it was made with, and has one output.

    Nothing is computed while it is recorded, as on a GPU: a step that writes states must not run twice.

    Attributes:
        made: all of them, in the order in which they were recorded.
    """

    made: list[Rerun] = []  # noqa: RUF012

    def __init__(self, work: Callable[[], Tensor], pool: Any) -> None:
        self._work, self.pool, self.times = work, pool, 0
        self._output: Tensor | None = None
        Rerun.made.append(self)

    def __call__(self) -> Tensor:
        self.times += 1
        output = self._work()
        self._output = output if self._output is None else self._output.copy_(output)
        return self._output


def pretend_recording(monkeypatch: pytest.MonkeyPatch) -> list[Rerun]:
    """Let stand-ins be recorded in place of CUDA graphs; return the list that they will stand in."""
    monkeypatch.setattr(replays, "record", Rerun)
    monkeypatch.setattr(replays, "new_pool", object)
    monkeypatch.setattr(Rerun, "made", [])
    return Rerun.made

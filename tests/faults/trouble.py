"""Trouble of one rank in one phase of a run: it stops, dies, fails, leaves, or does not come back."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

_FOR_EVER_S = 1e6


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise() -> None:
    raise RuntimeError("trouble of this rank alone")


def _run_out_of_memory() -> None:
    raise MemoryError


def _hang() -> None:
    time.sleep(_FOR_EVER_S)


ACTIONS: dict[str, Callable[[], None]] = {
    "stops": _stop, "is-killed": _kill, "raises": _raise, "has-no-memory": _run_out_of_memory, "hangs": _hang,
    "leaves": lambda: os._exit(0), "exits": lambda: sys.exit(3),
}  # fmt: skip
PHASES: dict[str, tuple[str, str, int]] = {
    "building": ("alignlab.loop.learner:Learner", "__init__", 1),
    "checking": ("alignlab.loop.training_loop:TrainingLoop", "train", 1),
    "collecting": ("alignlab.loop.source:RolloutSource", "sample", 2),
    "scoring": ("alignlab.loop.algorithm:Algorithm", "with_logprobs", 2),
    "updating": ("alignlab.loop.learner:Learner", "update", 2),
    "saving": ("alignlab.loop.training_loop:TrainingLoop", "save", 2),
    "evaluating": ("alignlab.loop.online:OnlineTrainer", "evaluate", 1),
    "ending": ("alignlab.loop.training_loop", "save_trained_model", 1),
}
"""What is called then, and at which call the trouble comes."""


def prepare(phase: str, action: str) -> None:
    """Have this process's run meet with the trouble."""
    import pkgutil

    place, name, at = PHASES[phase]
    owner: Any = pkgutil.resolve_name(place)
    plain = getattr(owner, name)
    calls = [0]

    def troubled(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            ACTIONS[action]()
        return plain(*arguments, **named)

    setattr(owner, name, troubled)

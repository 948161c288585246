"""Lines of the table that the GPU job prints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import torch

Verdict = Literal["ok", "failed", "figure", "skipped"]


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        name: what was tried or measured.
        verdict: "ok" or "failed" for a check, "figure" for a measurement, "skipped" for what this machine cannot run.
        detail: error, figure with its unit, or the reason.
    """

    name: str
    verdict: Verdict
    detail: str

    def to_json(self) -> str:
        """Return the line for another process."""
        return json.dumps(asdict(self))


def checked(name: str, error: float, limit: float) -> Line:
    """Return the line of an error that must not be above a limit; one that is not a number has failed."""
    return Line(name, "ok" if error <= limit else "failed", f"error {error:.2g}, at most {limit:.2g}")


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of the exact tensor."""
    return float((ours.double().cpu() - exact.double().cpu()).norm() / exact.double().cpu().norm())


def seconds_of(work: Callable[[], object], device: torch.device, *, rounds: int = 5) -> float:
    """Return the seconds of one call, the mean of several after one that is not counted."""
    work()
    _wait(device)
    start = time.perf_counter()
    for _ in range(rounds):
        work()
    _wait(device)
    return (time.perf_counter() - start) / rounds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

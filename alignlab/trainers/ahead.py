"""Rollouts of later steps, collected while a step is learnt from: bounded in age, paced, never thrown away."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from alignlab.errors import RolloutError
from alignlab.types import Rollout


@dataclass(frozen=True)
class Collected:
    """The scored rollouts of one step.

    Attributes:
        rollouts: to learn from.
        left_out: sampled too, and not learnt from.
        seconds: that collecting them took.
        position: of the data and of all that counts, once they were collected; a run that resumes after this step goes
            on from here.
    """

    rollouts: list[Rollout]
    left_out: list[Rollout]
    seconds: float
    position: dict[str, Any]


class RolloutsAhead:
    """Collects step after step: when asked, or up to `max_staleness` steps ahead, in order, in a thread of its own.

    The rollouts of step s + k are begun when step s is about to be learnt from, so that k updates at most lie between
    the weights that sampled a token and those that learn from it.

    Args:
        collect: makes the rollouts of a step.
        abandon: stops a collection that is running; it may raise.
        max_staleness: 0 collects when asked, in the caller's thread.
        last_step: of the run; none beyond it is collected.
    """

    def __init__(
        self, collect: Callable[[int], Collected], *, abandon: Callable[[], None], max_staleness: int, last_step: int
    ) -> None:
        self._collect, self._abandon = collect, abandon
        self._max_staleness, self._last_step = max_staleness, last_step
        self._thread: ThreadPoolExecutor | None = None
        self._begun: deque[tuple[int, Future[Collected]]] = deque()

    def take(self, step: int) -> Collected:
        """The rollouts of a step; those of the steps after it are begun. Steps are taken in order.

        Raises:
            whatever `collect` raised.
        """
        if self._max_staleness == 0:
            return self._collect(step)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="alignlab-rollouts")
        first = self._begun[-1][0] + 1 if self._begun else step
        for later in range(first, min(step + self._max_staleness, self._last_step) + 1):
            self._begun.append((later, self._thread.submit(self._collect, later)))
        number, future = self._begun.popleft()
        assert number == step, "steps are taken in order"
        return future.result()

    def close(self) -> None:
        """Stop collecting; what was collected and not taken is collected again by a run that resumes."""
        if self._thread is not None:
            for _, future in self._begun:
                future.cancel()
            self._abandon()
            self._thread.shutdown(wait=True)
            self._thread = None
            self._begun.clear()


def check_age(rollouts: Sequence[Rollout], policy_version: int, max_staleness: int) -> None:
    """See that no token is from weights that are too old to learn from.

    Raises:
        RolloutError: one is.
    """
    versions = [v for rollout in rollouts for c in rollout.completions for v in c.policy_versions]
    oldest = min(versions, default=policy_version)
    if policy_version - oldest > max_staleness:
        raise RolloutError(
            f"a token was sampled from version {oldest} of the policy, which is at version {policy_version}, and must "
            f"be at most {max_staleness} behind (rollout.max_staleness); nothing was learnt from it"
        )

"""Rollouts of later steps, collected while a step is learnt from: bounded in age, paced, never thrown away."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from alignlab.errors import RolloutError
from alignlab.types import Rollout

_PATIENCE_S = 10.0
_LOOK_S = 0.2


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
        abandon: stops what `collect` is waiting for, which may raise then.
        max_staleness: 0 collects when asked, in the caller's thread.
        last_step: of the run; none beyond it is collected.
    """

    def __init__(
        self, collect: Callable[[int], Collected], *, abandon: Callable[[], None], max_staleness: int, last_step: int
    ) -> None:
        self._collect, self._abandon = collect, abandon
        self._max_staleness, self._last_step = max_staleness, last_step
        self._thread: threading.Thread | None = None
        self._wanted: queue.SimpleQueue[tuple[int, Future[Collected]] | None] = queue.SimpleQueue()
        self._begun: deque[tuple[int, Future[Collected]]] = deque()

    def take(self, step: int) -> Collected:
        """The rollouts of a step; those of the steps after it are begun. Steps are taken in order.

        Raises:
            whatever `collect` raised.
        """
        if self._max_staleness == 0:
            return self._collect(step)
        if self._thread is None:
            # A daemon: where another rank is gone, a collection may wait for it for ever.
            self._thread = threading.Thread(target=self._work, name="alignlab-rollouts", daemon=True)
            self._thread.start()
        first = self._begun[-1][0] + 1 if self._begun else step
        for later in range(first, min(step + self._max_staleness, self._last_step) + 1):
            self._begun.append((later, Future()))
            self._wanted.put(self._begun[-1])
        number, future = self._begun.popleft()
        assert number == step, "steps are taken in order"
        return future.result()

    def close(self) -> None:
        """Stop collecting; what was collected and not taken is collected again by a run that resumes."""
        if self._thread is None:
            return
        for _, future in self._begun:
            future.cancel()
        self._wanted.put(None)
        for _ in range(round(_PATIENCE_S / _LOOK_S)):
            self._abandon()  # again, for what began after the last time
            self._thread.join(_LOOK_S)
            if not self._thread.is_alive():
                break
        self._thread = None
        self._begun.clear()

    def _work(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            step, future = wanted
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._collect(step))
                except BaseException as error:  # whatever it is, the step that takes it must learn of it
                    future.set_exception(error)


class CollectingVotes:
    """Whether any rank has too few rollouts for a step; every rank calls it together.

    Args:
        num_rounds: in which a step's prompts are drawn; with one there is nothing to vote on.
        group: of all ranks, for the messages of a thread that collects ahead: they must not meet those of the training.
            None where rollouts are collected in the training's thread, or there is one rank.
        any_rank: whether a flag is set on any rank, by the training's own messages.
    """

    def __init__(
        self, num_rounds: int, group: torch.distributed.ProcessGroup | None, any_rank: Callable[[bool], bool]
    ) -> None:
        self._num_rounds, self._group, self._any_rank = num_rounds, group, any_rank

    def __call__(self, short: bool, *, failed: bool = False) -> bool:
        """Vote.

        Args:
            short: whether this rank has too few rollouts.
            failed: whether this rank could not collect its rollouts.

        Raises:
            RolloutError: another rank has failed.
        """
        if self._num_rounds == 1:
            return False
        if self._group is None:
            any_failed, any_short = self._any_rank(failed), self._any_rank(short)
        else:
            votes = torch.tensor([float(short), float(failed)])
            torch.distributed.all_reduce(votes, group=self._group)
            any_short, any_failed = (votes > 0).tolist()
        if any_failed and not failed:
            raise RolloutError("another rank could not collect its rollouts; see its message")
        return bool(any_short)


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

"""Prefetch of later steps' rollouts while a step trains, with a bound on their age; none is thrown away."""

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

_CLOSE_LIMIT_S, _ABANDON_EVERY_S = 10.0, 0.2


@dataclass(frozen=True)
class RolloutBatch:
    """The scored rollouts of one step.

    Attributes:
        rollouts: rollouts to train on.
        dropped: rollouts that were sampled and are not trained on.
        seconds: duration of the collection.
        position: state of the data and of all counters after the collection, from which a run resumes after this step.
    """

    rollouts: list[Rollout]
    dropped: list[Rollout]
    seconds: float
    position: dict[str, Any]

    @property
    def all(self) -> list[Rollout]:
        """All sampled rollouts: those to train on, then the dropped ones."""
        return [*self.rollouts, *self.dropped]


class RolloutPrefetcher:
    """Collects step after step: on request, or up to `max_staleness` steps ahead, in order, in a second thread.

    The collection of step s + k is queued right before step s trains, so that at most k updates lie between the weights
    that sampled a token and the weights that train on it.

    Args:
        collect: returns the rollouts of a step.
        abandon: makes a running `collect` end soon; it may raise.
        max_staleness: 0 collects on request, in the caller's thread.
        last_step: last step of the run; no later step is collected.
    """

    def __init__(
        self, collect: Callable[[int], RolloutBatch], *, abandon: Callable[[], None], max_staleness: int, last_step: int
    ) -> None:
        self._collect, self._abandon = collect, abandon
        self._max_staleness, self._last_step = max_staleness, last_step
        self._thread: threading.Thread | None = None
        self._queue: queue.SimpleQueue[tuple[int, Future[RolloutBatch]] | None] = queue.SimpleQueue()
        self._pending: deque[tuple[int, Future[RolloutBatch]]] = deque()

    def take(self, step: int) -> RolloutBatch:
        """Return the rollouts of a step, and queue those of the steps after it. Steps are taken in order.

        Raises:
            whatever `collect` raised.
        """
        if self._max_staleness == 0:
            return self._collect(step)
        if self._thread is None:
            # A daemon thread, since a collection may wait for ever for a rank that is gone.
            self._thread = threading.Thread(target=self._work, name="alignlab-rollouts", daemon=True)
            self._thread.start()
        first = self._pending[-1][0] + 1 if self._pending else step
        for later in range(first, min(step + self._max_staleness, self._last_step) + 1):
            self._pending.append((later, Future()))
            self._queue.put(self._pending[-1])
        number, future = self._pending.popleft()
        assert number == step, "steps are taken in order"
        return future.result()

    def close(self) -> None:
        """Stop collecting. A run that resumes collects again what was not taken."""
        if self._thread is None:
            return
        for _, future in self._pending:
            future.cancel()
        self._queue.put(None)
        for _ in range(round(_CLOSE_LIMIT_S / _ABANDON_EVERY_S)):
            self._abandon()  # repeatedly: a request may have begun after the last time
            self._thread.join(_ABANDON_EVERY_S)
            if not self._thread.is_alive():
                break
        self._thread = None
        self._pending.clear()

    def _work(self) -> None:
        while (request := self._queue.get()) is not None:
            step, future = request
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._collect(step))
                except BaseException as error:  # raised again in `take`
                    future.set_exception(error)


class RefillVotes:
    """Vote on whether any rank has too few rollouts for a step; every rank calls it together.

    Args:
        num_rounds: rounds in which a step's prompts may be drawn; with one round there is no vote.
        group: process group of the prefetch thread, so that its collectives cannot interleave with training's; None
            where rollouts are collected in training's thread, or for a single rank.
        any_rank: returns whether a flag is set on any rank, by training's process group.
    """

    def __init__(
        self, num_rounds: int, group: torch.distributed.ProcessGroup | None, any_rank: Callable[[bool], bool]
    ) -> None:
        self._num_rounds, self._group, self._any_rank = num_rounds, group, any_rank

    def __call__(self, short: bool, *, failed: bool = False) -> bool:
        """Return whether any rank has too few rollouts.

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
    """Raise if a token was sampled from weights that are too old to train on.

    Raises:
        RolloutError: with the version of these weights.
    """
    versions = [v for rollout in rollouts for c in rollout.completions for v in c.policy_versions]
    oldest = min(versions, default=policy_version)
    if policy_version - oldest > max_staleness:
        raise RolloutError(
            f"a token was sampled from version {oldest} of the policy, which is at version {policy_version}, and must "
            f"be at most {max_staleness} behind (rollout.max_staleness); the step was not trained on"
        )

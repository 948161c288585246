"""Rollouts scored by reward functions; failed calls are reported, counted, and tolerated up to a limit."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from alignlab.config.rewards import RewardLimits
from alignlab.errors import RewardError
from alignlab.rollout.background import LoopThread
from alignlab.scoring.call_arguments import CallBatch
from alignlab.scoring.calls import FAILURE_KINDS, RewardCall, RewardFailure
from alignlab.scoring.loading import LoadedReward
from alignlab.scoring.places import place_for
from alignlab.scoring.values import LARGEST_TOTAL, RewardValues, clipped, weighted_sum
from alignlab.types import Rollout

logger = logging.getLogger(__name__)


class RewardRunner:
    """Calls reward functions on rollouts, each in its `Place` and within a time limit.

    A synchronous function runs in a thread, an asynchronous one on an event loop in a thread, concurrently with others,
    and one with `run_in: process` in a process. An `InlineReward` runs in the caller's thread, without a limit.

    Python cannot stop a thread: one that exceeds its time is abandoned, and keeps its core, its memory and its locks
    until it returns or the training's process ends (the thread is a daemon, so it does not keep that process alive).
    Native code that never releases the interpreter's lock stops the whole process. In a thread, a function must not use
    `signal.alarm`, and `os._exit` ends the run without a message.

    A value of None for a completion, or for all, is no failure: the reward does not apply, as to rows of another task.

    Args:
        rewards: the functions with their names, weights and options.
        limits: time limit of a call, and how many calls may fail.
        columns: columns of the whole dataset; a call whose rows all lack one gets it as a list of None.

    Attributes:
        rewards: the same, renamed with a number where two have the same name.
        failures: failed calls, by (name of the reward, kind of failure); see `FAILURE_KINDS`.
        last_failures: by name, the report of a reward's last failed call.
        num_calls: by name, calls since this start.
        num_useful_calls: by name, those of which at least one value could be read.
    """

    def __init__(
        self, rewards: Sequence[LoadedReward], limits: RewardLimits, *, columns: Sequence[str] = ()
    ) -> None:
        self.rewards = _with_distinct_names(rewards)
        self.limits, self.columns = limits, tuple(columns)
        self.failures: Counter[tuple[str, str]] = Counter()
        self.last_failures: dict[str, str] = {}
        self.num_calls: Counter[str] = Counter()
        self.num_useful_calls: Counter[str] = Counter()
        self._loop = LoopThread("alignlab-reward-loop")
        self._places = {reward.name: place_for(reward.function, reward.name, self._loop) for reward in self.rewards}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the rewards, in order."""
        return tuple(reward.name for reward in self.rewards)

    @property
    def num_failures(self) -> int:
        """Failed calls so far, over all rewards."""
        return self.failures.total()

    def metrics(self) -> dict[str, float]:
        """Return the metrics of all places so far, by name."""
        return {name: value for place in self._places.values() for name, value in place.metrics().items()}

    def state(self) -> dict[str, Any]:
        """Return, by name, the states of the rewards that have one, as JSON."""
        states = {name: place.state() for name, place in self._places.items()}
        return {name: state for name, state in states.items() if state}

    def load_state(self, states: Mapping[str, Any]) -> None:
        """Restore the result of `state`; a reward that is not in it keeps its state."""
        for name, place in self._places.items():
            if name in states:
                place.load_state(states[name])

    def load_state_of_ranks(self, states: Sequence[Mapping[str, Any]], rank: int, num_ranks: int) -> None:
        """Restore the results of `state` of all ranks, of which there may have been another number than now.

        Args:
            states: by the number of the earlier rank.
            rank: of this process.
            num_ranks: of the run as it is now.
        """
        if len(states) == num_ranks:
            self.load_state(states[rank])
            return
        for name, place in self._places.items():
            if all(name in of_rank for of_rank in states):
                of_reward = [of_rank[name] for of_rank in states]
                place.load_state(place.joined(of_reward[rank::num_ranks], of_reward))

    def score(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Return the rollouts with `rewards` and `reward_parts`.

        A completion's reward is the weighted sum of its parts that are not None, or nan where all are None. A part is
        None where its function returned None or failed.

        Raises:
            RewardError: more calls have failed than `limits.max_failures`, or a completion's sum is too large.
        """
        batch = CallBatch.of(rollouts, self.columns)
        if not len(batch):
            return list(rollouts)
        parts = self._parts(batch)
        totals = [self._total([values[i] for values in parts.values()]) for i in range(len(batch))]
        scored, start = [], 0
        for rollout in rollouts:
            stop = start + len(rollout.completions)
            group_parts = {name: tuple(values[start:stop]) for name, values in parts.items()}
            scored.append(replace(rollout, rewards=tuple(totals[start:stop]), reward_parts=group_parts))
            start = stop
        return scored

    def close(self) -> None:
        """Stop the event loop's thread and release what the places hold. A later `score` starts them again."""
        for place in self._places.values():
            place.close()
        self._loop.close()

    def _total(self, values: Sequence[float | None]) -> float:
        try:
            return weighted_sum([reward.weight for reward in self.rewards], values)
        except OverflowError:
            terms = ", ".join(f"{r.name} {v!r} x {r.weight:g}" for r, v in zip(self.rewards, values, strict=True))
            raise RewardError(
                f"a completion's rewards and their weighted sum must lie within {LARGEST_TOTAL:g} and "
                f"-{LARGEST_TOTAL:g}, and do not: {terms}; scale the functions or their weights down"
            ) from None

    def _parts(self, batch: CallBatch) -> dict[str, list[float | None]]:
        """Return every reward's values, in the order of the rewards."""
        calls: dict[str, RewardCall] = {}
        # Concurrent places first: they work while the others are called one after another.
        for reward in sorted(self.rewards, key=lambda reward: not self._places[reward.name].is_concurrent):
            call = calls[reward.name] = self._start(reward, batch)
            if not self._places[reward.name].is_concurrent:
                call.join()
        return {reward.name: self._values(reward, calls[reward.name], batch) for reward in self.rewards}

    def _start(self, reward: LoadedReward, batch: CallBatch) -> RewardCall:
        limit_s = self.limits.time_limit_s
        try:
            arguments = batch.arguments(reward)
        except RewardFailure as error:
            return RewardCall.failed(error, limit_s)
        return self._places[reward.name].start(arguments, len(batch), limit_s)

    def _values(self, reward: LoadedReward, call: RewardCall, batch: CallBatch) -> list[float | None]:
        """Return the values of a call once it has ended; None for every completion where the call failed."""
        self.num_calls[reward.name] += 1
        try:
            result: RewardValues = call.result()
        except RewardFailure as error:
            self._record_failure(reward.name, error, batch)
            return [None] * len(batch)
        self.num_useful_calls[reward.name] += result.num_unreadable < len(batch)
        if result.failure is not None:
            self._record_failure(reward.name, result.failure, batch)
        return result.values

    def _record_failure(self, name: str, failure: RewardFailure, batch: CallBatch) -> None:
        assert failure.kind in FAILURE_KINDS
        self.failures[name, failure.kind] += 1
        report = (
            f"reward {name!r} failed ({failure.kind}): {failure}; sample {failure.sample}: "
            f"prompt {clipped(batch.prompts[failure.sample])}, completion {clipped(batch.completions[failure.sample])}"
        )
        self.last_failures[name] = report
        logger.warning(
            "%s [failure %d of at most %d]", report, self.num_failures, self.limits.max_failures,
            exc_info=failure.__cause__,
        )  # fmt: skip
        if self.num_failures > self.limits.max_failures:
            counts = ", ".join(f"{reward} {kind} x{count}" for (reward, kind), count in sorted(self.failures.items()))
            raise RewardError(
                f"reward functions may fail {self.limits.max_failures} times (reward_limits.max_failures), and have "
                f"failed {self.num_failures} times: {counts}; correct the function, or raise the limit. Last: {report}"
            ) from failure.__cause__


def _with_distinct_names(rewards: Sequence[LoadedReward]) -> tuple[LoadedReward, ...]:
    """Return the rewards; the second of two with the same name gets `_2`, the third `_3`."""
    used_names = {reward.name for reward in rewards}
    assigned: set[str] = set()
    distinct = []
    for reward in rewards:
        name = reward.name
        if name in assigned:
            candidates = (f"{reward.name}_{number}" for number in itertools.count(2))
            name = next(candidate for candidate in candidates if candidate not in used_names)
            reward = replace(reward, name=name)
        assigned.add(name)
        used_names.add(name)
        distinct.append(reward)
    return tuple(distinct)

"""Rollouts scored by reward functions, whose failures are data: named, counted, survived up to a limit."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from alignlab.config.rewards import RewardLimits
from alignlab.errors import RewardError
from alignlab.rollout.loop_thread import LoopThread
from alignlab.training.reward_calls import FAILURE_KINDS, CallerReward, RewardCall, RewardFailure, failed, own_copy
from alignlab.training.reward_columns import RESERVED, missing_column
from alignlab.training.reward_functions import LoadedReward
from alignlab.training.reward_lookup import accepts_any, parameters, required
from alignlab.training.reward_places import place_of
from alignlab.training.reward_values import LARGEST_TOTAL, RewardValues, clipped, weighted_sum
from alignlab.types import Message, Rollout, Text

logger = logging.getLogger(__name__)

@dataclass(frozen=True)
class _Batch:
    """All completions of a scoring, one entry a completion, as reward functions receive them."""

    prompts: list[Text]
    completions: list[str | list[Message]]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.prompts)

    def arguments(self, reward: LoadedReward) -> dict[str, Any]:
        """What `reward` is called with: all that it takes, its options last. Nothing of it is shared with another call:
        what a function writes into it is seen by nobody else.

        Raises:
            RewardFailure: it requires an argument that neither the dataset nor the options have.
        """
        given: dict[str, Any] = dict(self.columns) | {"prompts": self.prompts, "completions": self.completions}
        given |= {"completion_ids": self.completion_ids, **reward.options}
        known = parameters(reward.function)
        if known is not None and "prompt_ids" in known:  # TRL gives none: only who names them gets them
            given["prompt_ids"] = self.prompt_ids
        missing = [name for name in required(known or {}) if name not in given]
        if missing:
            message = missing_column(reward.name, missing[0], list(self.columns), "the dataset")
            raise RewardFailure("missing column", message)
        if known is not None and not accepts_any(known):
            given = {name: given[name] for name in known if name in given}
        own = {name: own_copy(reward.options[name]) for name in given if name in reward.options}
        return {name: own[name] if name in own else list(map(own_copy, values)) for name, values in given.items()}


class RewardRunner:
    """Calls reward functions on rollouts, each where it runs (`reward_places`, `reward_process`) and within a limit of
    time.

    A synchronous function runs in a thread of its own, an asynchronous one on an event loop in a thread, which runs
    them at the same time, and one with `run_in: process` in a process of its own. A thread that is over its time is
    abandoned, since Python cannot stop it: it keeps its core, its memory and any lock it holds until it returns or the
    process ends (it is a daemon, so it does not keep the process alive), and native code that never releases the
    interpreter's lock stops everything. In a thread, a function must not use `signal.alarm`, and one that calls
    `os._exit` ends the run without a word. A `CallerReward` runs in the caller's thread instead, without a limit.

    None for a sample, or for all of a call, is no failure: the reward does not apply to it, as one does not apply to
    the rows of another task.

    Args:
        columns: of the whole dataset; a column that no row of a call has is passed all the same, as None for each.

    Attributes:
        failures: failed calls by (name of the reward, kind), the kind one of `FAILURE_KINDS`.
        names: of the rewards, in order, made distinct by a number where two are the same.
        last_failures: by name, how the last failed call of a reward is reported.
        num_calls, num_worked: by name, calls since this start, and those among them of which anything could be used.
    """

    def __init__(
        self, rewards: Sequence[LoadedReward], limits: RewardLimits, *, columns: Sequence[str] = ()
    ) -> None:
        self.rewards = _with_distinct_names(rewards)
        self.limits, self.columns = limits, tuple(columns)
        self.failures: Counter[tuple[str, str]] = Counter()
        self.last_failures: dict[str, str] = {}
        self.num_calls: Counter[str] = Counter()
        self.num_worked: Counter[str] = Counter()
        self._loop = LoopThread("alignlab-reward-loop")
        self._places = {each.name: place_of(each.function, each.name, self._loop) for each in self.rewards}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(reward.name for reward in self.rewards)

    @property
    def num_failures(self) -> int:
        """Failed calls so far, over all functions."""
        return self.failures.total()

    def metrics(self) -> dict[str, float]:
        """What there is to see of the rewards' work so far, by name."""
        return {name: value for place in self._places.values() for name, value in place.metrics().items()}

    def state(self) -> dict[str, Any]:
        """By name, what each `CallerReward` that has a state needs to go on, as JSON."""
        states = {name: function.state() for name, function in self._callers().items()}
        return {name: state for name, state in states.items() if state}

    def load_state(self, states: Mapping[str, Any]) -> None:
        """Take back what `state` gave; a reward that it does not name stays as it is."""
        for name, function in self._callers().items():
            if name in states:
                function.load_state(states[name])

    def _callers(self) -> dict[str, CallerReward]:
        functions: dict[str, Any] = {each.name: each.function for each in self.rewards}
        return {name: function for name, function in functions.items() if isinstance(function, CallerReward)}

    def score(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts with `rewards`, the weighted sum of the parts that apply to each completion, and `reward_parts`.

        A part is None where its function returned None or failed; a completion to which no part applies has reward nan.

        Raises:
            RewardError: more calls have failed than `limits.max_failures`, or a completion's sum is too large.
        """
        batch = _batch(rollouts, self.columns)
        if not len(batch):
            return list(rollouts)
        parts = self._parts(batch)
        totals = [self._total([values[i] for values in parts.values()]) for i in range(len(batch))]
        scored, start = [], 0
        for rollout in rollouts:
            stop = start + len(rollout.completions)
            own = {name: tuple(values[start:stop]) for name, values in parts.items()}
            scored.append(replace(rollout, rewards=tuple(totals[start:stop]), reward_parts=own))
            start = stop
        return scored

    def close(self) -> None:
        """Stop the event loop's thread, and free what the places hold. A later `score` starts them again."""
        for place in self._places.values():
            place.close()
        self._loop.close()

    def _total(self, values: Sequence[float | None]) -> float:
        try:
            return weighted_sum([reward.weight for reward in self.rewards], values)
        except OverflowError:
            given = ", ".join(f"{r.name} {v!r} x {r.weight:g}" for r, v in zip(self.rewards, values, strict=True))
            raise RewardError(
                f"a completion's rewards and their weighted sum must lie within {LARGEST_TOTAL:g} and "
                f"-{LARGEST_TOTAL:g}, and do not: {given}; scale the functions or their weights down"
            ) from None

    def _parts(self, batch: _Batch) -> dict[str, list[float | None]]:
        """Values by reward, in the order of the rewards; those that run beside others are started first."""
        beside = [reward for reward in self.rewards if self._places[reward.name].runs_beside]
        calls = {reward.name: self._start(reward, batch) for reward in beside}
        for reward in self.rewards:
            if reward.name not in calls:
                calls[reward.name] = self._start(reward, batch)
                calls[reward.name].join()
        return {reward.name: self._collect(reward, calls[reward.name], batch) for reward in self.rewards}

    def _start(self, reward: LoadedReward, batch: _Batch) -> RewardCall:
        limit_s = self.limits.time_limit_s
        try:
            arguments = batch.arguments(reward)
        except RewardFailure as error:
            return RewardCall(failed(error), limit_s)
        return self._places[reward.name].start(arguments, len(batch), limit_s)

    def _collect(self, reward: LoadedReward, call: RewardCall, batch: _Batch) -> list[float | None]:
        self.num_calls[reward.name] += 1
        try:
            read: RewardValues = call.result()
        except RewardFailure as error:
            self._count(reward.name, error, batch)
            return [None] * len(batch)
        self.num_worked[reward.name] += read.num_unread < len(batch)
        if read.failure is not None:
            self._count(reward.name, read.failure, batch)
        return read.values

    def _count(self, name: str, failure: RewardFailure, batch: _Batch) -> None:
        assert failure.kind in FAILURE_KINDS
        self.failures[name, failure.kind] += 1
        report = (
            f"reward {name!r} failed ({failure.kind}): {failure}; sample {failure.sample}: "
            f"prompt {clipped(batch.prompts[failure.sample])}, completion {clipped(batch.completions[failure.sample])}"
        )
        self.last_failures[name] = report
        logger.warning(
            "%s [failure %d, %d are survived]", report, self.num_failures, self.limits.max_failures,
            exc_info=failure.__cause__,
        )  # fmt: skip
        if self.num_failures > self.limits.max_failures:
            counts = ", ".join(f"{who} {kind} x{count}" for (who, kind), count in sorted(self.failures.items()))
            raise RewardError(
                f"reward functions may fail {self.limits.max_failures} times (reward_limits.max_failures), and have "
                f"failed {self.num_failures} times: {counts}; correct the function, or raise the limit. Last: {report}"
            ) from failure.__cause__


def _batch(rollouts: Sequence[Rollout], columns: Sequence[str]) -> _Batch:
    """One entry a completion. A column that a row lacks is None there."""
    pairs = [(rollout.prompt, completion) for rollout in rollouts for completion in rollout.completions]
    found = (name for prompt, _ in pairs for name in prompt.columns if name not in RESERVED)
    names = dict.fromkeys([*found, *columns])
    return _Batch(
        prompts=[prompt.text for prompt, _ in pairs],
        completions=[_like_prompt(prompt.text, completion.text) for prompt, completion in pairs],
        prompt_ids=[list(prompt.token_ids) for prompt, _ in pairs],
        completion_ids=[list(completion.token_ids) for _, completion in pairs],
        columns={name: [prompt.columns.get(name) for prompt, _ in pairs] for name in names},
    )


def _like_prompt(prompt: Text, completion: str) -> str | list[Message]:
    """A string after a string, a chat message after a chat."""
    return completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]


def _with_distinct_names(rewards: Sequence[LoadedReward]) -> tuple[LoadedReward, ...]:
    taken = {reward.name for reward in rewards}
    seen: set[str] = set()
    distinct = []
    for reward in rewards:
        name = reward.name
        if name in seen:
            name = next(other for number in itertools.count(2) if (other := f"{reward.name}_{number}") not in taken)
            reward = replace(reward, name=name)
        seen.add(name)
        taken.add(name)
        distinct.append(reward)
    return tuple(distinct)

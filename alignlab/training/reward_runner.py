"""Rollouts scored by reward functions, whose failures are data: named, counted, survived up to a limit."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import numbers
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from alignlab.config.rewards import RewardLimits
from alignlab.errors import RewardError
from alignlab.rollout.loop_thread import LoopThread
from alignlab.training.reward_calls import (
    CallerReward,
    RewardCall,
    RewardFailure,
    failed,
    in_caller,
    in_thread,
    is_async,
)
from alignlab.training.reward_functions import LoadedReward, accepts_any, parameters
from alignlab.types import Message, Rollout, Text

logger = logging.getLogger(__name__)

FAILURE_KINDS = (
    "raised", "timeout", "wrong count", "not a list", "not a number", "not finite", "only None", "missing column",
)  # fmt: skip
_CLIP = 200
_OF_TRL = ("trainer_state", "log_extra", "log_metric")
_RESERVED = ("prompt", "prompts", "completion", "completions", "completion_ids")


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
        """What `reward` is called with: all that it takes, in fresh lists; its options last.

        Raises:
            RewardFailure: it requires an argument that neither the dataset nor the options have.
        """
        given: dict[str, Any] = {name: list(values) for name, values in self.columns.items()}
        given |= {"prompts": [_copied(text) for text in self.prompts], "completions": list(self.completions)}
        given |= {"completion_ids": [list(ids) for ids in self.completion_ids], **reward.options}
        known = parameters(reward.function)
        if known is None:
            return given
        if "prompt_ids" in known:  # TRL gives none: only who names them gets them
            given["prompt_ids"] = [list(ids) for ids in self.prompt_ids]
        self._refuse_missing([name for name in _required(known) if name not in given])
        return given if accepts_any(known) else {name: given[name] for name in known if name in given}

    def _refuse_missing(self, names: Sequence[str]) -> None:
        of_trl = [name for name in names if name in _OF_TRL]
        if of_trl:
            raise RewardFailure(
                "missing column", f"requires {of_trl[0]}, which TRL passes and alignlab does not; give it a default"
            )
        if names:
            raise RewardFailure(
                "missing column",
                f"requires {', '.join(names)}, and the dataset has only {', '.join(self.columns) or 'no columns'}; "
                "add the column, or set the reward's option of that name",
            )


class RewardRunner:
    """Calls reward functions on rollouts, each within a time limit.

    A synchronous function runs in a thread of its own, an asynchronous one on an event loop in a thread; the
    asynchronous ones run at the same time. A function that is over its time is abandoned, since Python cannot stop a
    thread: it keeps its core, its memory and any lock it holds until it returns or the process ends (its thread is a
    daemon, so it does not keep the process alive), and native code that never releases the interpreter's lock stops
    everything. Signals do not work in a thread: a function must not use `signal.alarm`. Untrusted code needs a process
    of its own. A `CallerReward` runs in the caller's thread instead, without a limit.

    Attributes:
        failures: failed calls by (name of the reward, kind), the kind one of `FAILURE_KINDS`.
        names: of the rewards, in order, made distinct by a number where two are the same.
    """

    def __init__(self, rewards: Sequence[LoadedReward], limits: RewardLimits) -> None:
        self.rewards = _with_distinct_names(rewards)
        self.limits = limits
        self.failures: Counter[tuple[str, str]] = Counter()
        self._loop = LoopThread("alignlab-reward-loop")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(reward.name for reward in self.rewards)

    @property
    def num_failures(self) -> int:
        """Failed calls so far, over all functions."""
        return self.failures.total()

    def metrics(self) -> dict[str, float]:
        """What there is to see of the rewards' work so far, by name."""
        found: dict[str, float] = {}
        for reward in self.rewards:
            found |= reward.function.metrics() if isinstance(reward.function, CallerReward) else {}
        return found

    def score(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts with `rewards`, the weighted sum of the parts that apply to each completion, and `reward_parts`.

        A part is None where its function returned None or failed; a completion to which no part applies has reward nan.

        Raises:
            RewardError: more calls have failed than `limits.max_failures`.
        """
        batch = _batch(rollouts)
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
        """Stop the event loop's thread. A later `score` starts another."""
        self._loop.close()

    def _total(self, values: Sequence[float | None]) -> float:
        applying = [r.weight * v for r, v in zip(self.rewards, values, strict=True) if v is not None]
        return math.fsum(applying) if applying else math.nan

    def _parts(self, batch: _Batch) -> dict[str, list[float | None]]:
        """Values by reward, in the order of the rewards; asynchronous functions are started before the others run."""
        calls = {reward.name: self._start(reward, batch) for reward in self.rewards if is_async(reward.function)}
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
        if is_async(reward.function):
            return RewardCall(self._loop.submit(reward.function(**arguments)), limit_s)
        run = in_caller if isinstance(reward.function, CallerReward) else in_thread
        return RewardCall(run(lambda: reward.function(**arguments)), limit_s)

    def _result(self, call: RewardCall) -> Any:
        """What the call returned, awaited where a plain function returned an awaitable."""
        try:
            result = call.result()
            if inspect.isawaitable(result):
                call.future = self._loop.submit(result)
                result = call.result()
        except RewardFailure as error:
            if error.kind == "timeout":
                self._loop.replace_if_blocked()
            raise
        return result

    def _collect(self, reward: LoadedReward, call: RewardCall, batch: _Batch) -> list[float | None]:
        try:
            values = _as_list(self._result(call), len(batch))
        except RewardFailure as error:
            self._count(reward.name, error, batch)
            return [None] * len(batch)
        checked: list[float | None] = []
        first_bad: RewardFailure | None = None
        for sample, value in enumerate(values):
            try:
                checked.append(_as_number(value, sample))
            except RewardFailure as error:
                checked.append(None)
                first_bad = first_bad or error
        if first_bad is None and all(value is None for value in checked):
            first_bad = RewardFailure("only None", "returned None for every sample, so it applies to none of them")
        if first_bad is not None:
            self._count(reward.name, first_bad, batch)
        return checked

    def _count(self, name: str, failure: RewardFailure, batch: _Batch) -> None:
        assert failure.kind in FAILURE_KINDS
        self.failures[name, failure.kind] += 1
        report = (
            f"reward {name!r} failed ({failure.kind}): {failure}; sample {failure.sample}: "
            f"prompt {_clip(batch.prompts[failure.sample])}, completion {_clip(batch.completions[failure.sample])}"
        )
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


def _as_list(result: Any, count: int) -> list[Any]:
    """The result as a list of `count` values; a tensor or an array of numbers is one too."""
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, list | tuple):
        raise RewardFailure("not a list", f"must return a list, and returned {type(result).__name__}")
    if len(values) != count:
        raise RewardFailure("wrong count", f"must return {count} values, one a completion, and returned {len(values)}")
    return list(values)


def _as_number(value: Any, sample: int) -> float | None:
    try:
        plain = value.item() if hasattr(value, "item") else value
        if plain is None:
            return None
        number = float(plain) if isinstance(plain, numbers.Real) else None
    except (RuntimeError, ValueError, OverflowError):  # an array of several, an integer beyond a float
        number = None
    if number is None:
        raise RewardFailure("not a number", f"returned {_clip(value)} ({type(value).__name__})", sample)
    if not math.isfinite(number):
        raise RewardFailure("not finite", f"returned {value}", sample)
    return number


def _batch(rollouts: Sequence[Rollout]) -> _Batch:
    """One entry a completion. A column that a row lacks is None there."""
    pairs = [(rollout.prompt, completion) for rollout in rollouts for completion in rollout.completions]
    names = dict.fromkeys(name for prompt, _ in pairs for name in prompt.columns if name not in _RESERVED)
    return _Batch(
        prompts=[prompt.text for prompt, _ in pairs],
        completions=[_like_prompt(prompt.text, completion.text) for prompt, completion in pairs],
        prompt_ids=[list(prompt.token_ids) for prompt, _ in pairs],
        completion_ids=[list(completion.token_ids) for _, completion in pairs],
        columns={name: [prompt.columns.get(name) for prompt, _ in pairs] for name in names},
    )


def _copied(text: Text) -> Text:
    """A prompt that a reward may write into."""
    return text if isinstance(text, str) else copy.deepcopy(list(text))


def _like_prompt(prompt: Text, completion: str) -> str | list[Message]:
    """A string after a string, a chat message after a chat."""
    return completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]


def _required(known: Mapping[str, inspect.Parameter]) -> list[str]:
    """Names of the parameters that a call must give."""
    return [
        name
        for name, parameter in known.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]


def _with_distinct_names(rewards: Sequence[LoadedReward]) -> tuple[LoadedReward, ...]:
    seen: Counter[str] = Counter()
    distinct = []
    for reward in rewards:
        seen[reward.name] += 1
        number = seen[reward.name]
        distinct.append(reward if number == 1 else replace(reward, name=f"{reward.name}_{number}"))
    return tuple(distinct)


def _clip(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _CLIP else f"{text[:_CLIP]}..."

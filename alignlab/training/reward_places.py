"""The places inside this process where reward functions run: the caller's thread, a thread, an event loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from alignlab.rollout.loop_thread import LoopThread
from alignlab.training.reward_calls import (
    CallerReward,
    CallPlace,
    RewardCall,
    contained,
    in_caller,
    in_thread,
    is_async,
)
from alignlab.training.reward_process import IsolatedReward, ProcessPlace
from alignlab.training.reward_values import RewardValues, read_values


def place_of(function: Callable[..., Any], name: str, loop: LoopThread) -> CallPlace:
    """Return where a function runs.

    Args:
        name: of the reward, for metrics.
        loop: which all asynchronous functions share.
    """
    if isinstance(function, IsolatedReward):
        return ProcessPlace(function, name)
    if isinstance(function, CallerReward):
        return CallerPlace(function)
    return LoopPlace(function, loop) if is_async(function) else ThreadPlace(function, loop)


class CallerPlace:
    """The caller's thread, without a limit."""

    runs_beside = False

    def __init__(self, function: CallerReward) -> None:
        self._function: Any = function

    def start(self, arguments: Mapping[str, Any], count: int, limit_s: float) -> RewardCall:
        """Call the function and wait for it."""
        return RewardCall(in_caller(lambda: read_values(self._function(**arguments), count)), limit_s)

    def metrics(self) -> dict[str, float]:
        """What the reward counts itself."""
        metrics: dict[str, float] = self._function.metrics()
        return metrics

    def close(self) -> None:
        """Nothing is held."""


class ThreadPlace:
    """A thread of its own for each call, abandoned when its time is over."""

    runs_beside = False

    def __init__(self, function: Callable[..., Any], loop: LoopThread) -> None:
        self._function, self._loop = function, loop

    def start(self, arguments: Mapping[str, Any], count: int, limit_s: float) -> RewardCall:
        """Call the function; an awaitable that it returns is awaited on the event loop."""
        awaited: list[Future[Any]] = []

        def work() -> RewardValues:
            result = self._function(**arguments)
            if inspect.isawaitable(result):
                awaited.append(self._loop.submit(contained(result)))
                result = awaited[0].result()
            return read_values(result, count)

        def abandon() -> None:
            for future in awaited:
                future.cancel()
                self._loop.replace_if_blocked()

        return RewardCall(in_thread(work), limit_s, abandon)

    def metrics(self) -> dict[str, float]:
        """Nothing to see."""
        return {}

    def close(self) -> None:
        """The loop is its owner's to close."""


class LoopPlace:
    """An event loop, which lives on between calls, so that connections may be kept open."""

    runs_beside = True

    def __init__(self, function: Callable[..., Any], loop: LoopThread) -> None:
        self._function, self._loop = function, loop

    def start(self, arguments: Mapping[str, Any], count: int, limit_s: float) -> RewardCall:
        """Begin the coroutine."""

        async def work() -> RewardValues:
            return read_values(await self._function(**arguments), count)

        return RewardCall(self._loop.submit(contained(work())), limit_s, self._loop.replace_if_blocked)

    def metrics(self) -> dict[str, float]:
        """Nothing to see."""
        return {}

    def close(self) -> None:
        """The loop is its owner's to close."""

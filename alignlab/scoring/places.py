"""Places where a reward function runs: the caller's thread, a new thread, an event loop, a process.

A `RewardRunner` starts calls and waits for them; only a function's `Place` knows where the calls run.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, ClassVar, Protocol

from alignlab.rollout.background import LoopThread
from alignlab.scoring.calls import (
    InlineReward,
    RewardCall,
    RewardFailure,
    exits_as_failures,
    is_async,
    run_in_thread,
    run_inline,
)
from alignlab.scoring.isolated.reward import IsolatedReward, RewardProcess, json_problem, not_json_message
from alignlab.scoring.values import RewardValues, read_values

logger = logging.getLogger(__name__)


class Place(Protocol):
    """A place in which the calls of one reward function run.

    Attributes:
        is_concurrent: whether a call may run while functions of other places run.
    """

    is_concurrent: ClassVar[bool] = False

    def start(self, arguments: Mapping[str, Any], count: int, limit_s: float) -> RewardCall:
        """Start a call.

        Args:
            arguments: keyword arguments of the function.
            count: completions that the call is about.
            limit_s: seconds after which the call is given up.

        Returns:
            A call whose result is the `RewardValues` of what the function returned.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Return the place's metrics so far, by name."""
        return {}

    def state(self) -> dict[str, Any]:
        """Return what the function needs to go on after a step, as JSON; empty for a function without a state."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state`."""
        return None

    def joined(self, states: Sequence[Mapping[str, Any]], all_states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the state of a rank of a run that goes on on another number of ranks; see `InlineReward.joined`."""
        return {}

    def close(self) -> None:
        """Release what the place holds. A later `start` works all the same."""
        return None


def place_for(function: Callable[..., Any], name: str, loop: LoopThread) -> Place:
    """Return the place where a reward function runs.

    Args:
        function: the reward function.
        name: name of the reward in metrics and messages.
        loop: event loop that all asynchronous functions share; its owner closes it.
    """
    if isinstance(function, IsolatedReward):
        return ProcessPlace(function, name)
    if isinstance(function, InlineReward):
        return InlinePlace(function)
    return EventLoopPlace(function, loop) if is_async(function) else ThreadPlace(function, loop)


class InlinePlace(Place):
    """The caller's thread, without a time limit."""

    def __init__(self, function: InlineReward) -> None:
        self._reward = function

    def start(self, arguments: Mapping[str, Any], count: int, limit_s: float) -> RewardCall:
        """Call the function and wait until it returns."""
        return RewardCall(run_inline(lambda: read_values(self._reward(**arguments), count)), limit_s)

    def metrics(self) -> dict[str, float]:
        """Return the reward's own metrics."""
        return self._reward.metrics()

    def state(self) -> dict[str, Any]:
        """Return the reward's state."""
        return self._reward.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the reward's state."""
        self._reward.load_state(state)

    def joined(self, states: Sequence[Mapping[str, Any]], all_states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the reward's state."""
        return self._reward.joined(states, all_states)


class ThreadPlace(Place):
    """A new thread for each call, abandoned when its time is over."""

    def __init__(self, function: Callable[..., Any], loop: LoopThread) -> None:
        self._function, self._loop = function, loop

    def start(self, arguments: Mapping[str, Any], count: int, limit_s: float) -> RewardCall:
        """Call the function in a thread; an awaitable that it returns is awaited on the event loop."""
        pending: list[Future[Any]] = []

        def work() -> RewardValues:
            result = self._function(**arguments)
            if inspect.isawaitable(result):
                pending.append(self._loop.submit(exits_as_failures(result)))
                result = pending[0].result()
            return read_values(result, count)

        def abandon() -> None:
            for future in pending:
                future.cancel()
                self._loop.replace_if_blocked()

        return RewardCall(run_in_thread(work), limit_s, abandon)


class EventLoopPlace(Place):
    """An event loop that lives on between calls, so that connections can be kept open."""

    is_concurrent = True

    def __init__(self, function: Callable[..., Any], loop: LoopThread) -> None:
        self._function, self._loop = function, loop

    def start(self, arguments: Mapping[str, Any], count: int, limit_s: float) -> RewardCall:
        """Start the function's coroutine."""

        async def work() -> RewardValues:
            return read_values(await self._function(**arguments), count)

        return RewardCall(self._loop.submit(exits_as_failures(work())), limit_s, self._loop.replace_if_blocked)


class ProcessPlace(Place):
    """A process, which is killed when a call's time is over and started again for the next call."""

    is_concurrent = True

    def __init__(self, reward: IsolatedReward, name: str) -> None:
        self._reward, self._name = reward, name
        self._process: RewardProcess | None = None
        self._has_warned_of_output = False

    def start(self, arguments: Mapping[str, Any], count: int, limit_s: float) -> RewardCall:
        """Call the function in its process; where the process has ended, start another first."""
        process = self._process = self._process or self._reward.borrow_process()
        problems = ((name, json_problem(value)) for name, value in arguments.items())
        unsendable = next(((name, problem) for name, problem in problems if problem is not None), None)
        try:
            if unsendable is not None:
                raise RewardFailure("not JSON", not_json_message(self._name, *unsendable))
            if not process.is_running:
                process.start()
        except RewardFailure as error:
            return RewardCall.failed(error, limit_s)
        return RewardCall(run_in_thread(lambda: process.call(arguments, count)), limit_s, process.end)

    def metrics(self) -> dict[str, float]:
        """Return how many bytes the function has printed, where it prints; the first time, warn with the output."""
        process = self._process
        if process is None or not process.output.num_bytes:
            return {}
        if not self._has_warned_of_output:
            self._has_warned_of_output = True
            logger.warning(
                "reward %r prints, and its output is not shown; the last of it: %s", self._name, process.output.tail
            )
        return {f"printed_bytes/{self._name}": float(process.output.num_bytes)}

    def close(self) -> None:
        """Return the process to the reward, which keeps it for the next user."""
        if self._process is not None:
            self._reward.return_process(self._process)
            self._process = None

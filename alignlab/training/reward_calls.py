"""Where reward functions run (`CallPlace`), and calls of them that are waited for no longer than a limit."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future, wait
from typing import Any, Protocol

from alignlab.errors import JudgeError, NumericsError

FAILURE_KINDS = (
    "raised", "timeout", "wrong count", "not a list", "not a number", "not finite", "missing column", "exited",
    "out of memory", "not JSON",
)  # fmt: skip
_CLIP = 2000


class RewardFailure(Exception):
    """What went wrong in one call: its kind, which is counted, and the sample it is shown on."""

    def __init__(self, kind: str, message: str, sample: int = 0) -> None:
        super().__init__(message)
        self.kind = kind
        self.sample = sample


class RewardCall:
    """A call that is under way, or is over.

    Args:
        future: of what `CallPlace.start` promises.
        limit_s: from now on.
        abandon: called where the limit is over, to stop the call.
    """

    def __init__(self, future: Future[Any], limit_s: float, abandon: Callable[[], object] = lambda: None) -> None:
        self.future = future
        self.limit_s = limit_s
        self._abandon = abandon
        self._deadline = time.monotonic() + limit_s

    @property
    def remaining_s(self) -> float:
        return max(self._deadline - time.monotonic(), 0.0)

    def join(self) -> None:
        """Wait until the call or its time is over."""
        wait([self.future], timeout=self.remaining_s)

    def result(self) -> Any:
        """What the call came to.

        Raises:
            RewardFailure: it raised, or its time was over.
        """
        self.join()
        if not self.future.done():
            self.future.cancel()
            self._abandon()
            raise RewardFailure("timeout", f"took longer than time_limit_s ({self.limit_s:g})")
        if self.future.cancelled():
            raise RewardFailure("raised", "was cancelled")
        error = self.future.exception()
        if error is None:
            return self.future.result()
        if isinstance(error, RewardFailure):
            raise error
        raise RewardFailure("raised", described(error)) from error


def described(error: BaseException) -> str:
    """Return the class and the text of what a reward raised, cut to a readable length."""
    try:
        text = str(error)
    except Exception:  # its class is the author's, too
        text = "(its text cannot be had)"
    return f"{type(error).__name__}: {text[:_CLIP]}"


def failed(error: RewardFailure) -> Future[Any]:
    """A call that failed before it began."""
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


class CallPlace(Protocol):
    """Where one reward function runs.

    Attributes:
        runs_beside: whether the functions of other places may run at the same time.
    """

    runs_beside: bool

    def start(self, arguments: Mapping[str, Any], count: int, limit_s: float) -> RewardCall:
        """Call the function on `count` completions; the call comes to the `RewardValues` of what it returned."""
        ...

    def metrics(self) -> dict[str, float]:
        """What there is to see of the place so far, by name."""
        ...

    def close(self) -> None:
        """Free what the place holds. A later `start` works all the same."""
        ...


class CallerReward:
    """A reward that runs in the caller's thread and sees to its own time: one that was abandoned, as others are after
    `time_limit_s`, would leave the policy's model in another role. A JudgeError of it is no failed reward: it ends the
    run, which can be resumed."""

    def metrics(self) -> dict[str, float]:
        """What there is to see of it so far, by name."""
        return {}

    def state(self) -> dict[str, Any]:
        """What it needs to go on after a step, as JSON; nothing by default."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave; nothing by default."""


def in_caller(function: Callable[[], Any]) -> Future[Any]:
    """Run `function` here and now, for as long as it takes."""
    future: Future[Any] = Future()
    try:
        future.set_result(function())
    except JudgeError:
        raise
    except NumericsError as error:
        future.set_exception(RewardFailure("not finite", str(error)))
    except Exception as error:
        future.set_exception(error)
    return future


async def contained(awaitable: Awaitable[Any]) -> Any:
    """Await it, and turn an attempt to end the process into a failure: it would end the event loop instead, and all
    that runs on it.

    Raises:
        RewardFailure: it raised SystemExit or KeyboardInterrupt.
    """
    try:
        return await awaitable
    except (SystemExit, KeyboardInterrupt) as error:
        raise RewardFailure("raised", described(error)) from error


def in_thread(function: Callable[[], Any]) -> Future[Any]:
    """Run `function` in a new daemon thread; a pool would lose a worker to each function that hangs."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()

    def work() -> None:
        try:
            result = function()
        except BaseException as error:  # whatever it is, the waiting thread must learn of it
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=work, name="alignlab-reward", daemon=True).start()
    return future


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine: an async function, or an object whose `__call__` is one."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def own_copy(value: Any) -> Any:
    """Return a copy that a reward may write into. What cannot be copied, such as a lock or a client, is passed as it
    is, inside a container that is a copy."""
    try:
        return copy.deepcopy(value)
    except Exception:  # a class may refuse in any way
        pass
    if type(value) is dict:
        return {key: own_copy(held) for key, held in value.items()}
    return type(value)(map(own_copy, value)) if type(value) in (list, tuple, set) else value

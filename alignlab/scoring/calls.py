"""Calls of reward functions that are waited for no longer than a limit, and how they fail."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any

from alignlab.errors import AlignlabError, NumericsError

FAILURE_KINDS = (
    "raised", "timeout", "wrong count", "not a list", "not a number", "not finite", "missing column", "exited",
    "out of memory", "not JSON",
)  # fmt: skip
_MAX_ERROR_CHARS = 2000


class RewardFailure(Exception):
    """A failed call of a reward function.

    Args:
        kind: one of `FAILURE_KINDS`, under which the failure is counted.
        message: what happened.
        sample: index of the completion that the failure is reported with.
    """

    def __init__(self, kind: str, message: str, sample: int = 0) -> None:
        super().__init__(message)
        self.kind = kind
        self.sample = sample


class RewardCall:
    """A call of a reward function that is running or has ended.

    Args:
        future: the result, or the error that the call ended with.
        limit_s: seconds from now after which the call is given up.
        abandon: stops the call; called when the limit is over.
    """

    def __init__(self, future: Future[Any], limit_s: float, abandon: Callable[[], object] = lambda: None) -> None:
        self.future = future
        self.limit_s = limit_s
        self._abandon = abandon
        self._deadline = time.monotonic() + limit_s

    @classmethod
    def failed(cls, error: RewardFailure, limit_s: float) -> RewardCall:
        """Return a call that failed before it began."""
        future: Future[Any] = Future()
        future.set_exception(error)
        return cls(future, limit_s)

    @property
    def remaining_s(self) -> float:
        """Seconds until the call is given up, >= 0."""
        return max(self._deadline - time.monotonic(), 0.0)

    def join(self) -> None:
        """Wait until the call has ended or its time is over."""
        wait([self.future], timeout=self.remaining_s)

    def result(self) -> Any:
        """Return the call's result, once it has ended.

        Raises:
            RewardFailure: the call raised an error, or its time is over.
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
        raise RewardFailure("raised", describe_error(error)) from error


def describe_error(error: BaseException) -> str:
    """Return the class and the text of an error that a reward raised, cut to a readable length."""
    try:
        text = str(error)
    except Exception:  # the error's class is the reward author's code
        text = "(its text cannot be read)"
    return f"{type(error).__name__}: {text[:_MAX_ERROR_CHARS]}"


class InlineReward(ABC):
    """A reward that runs in the thread that asks for rewards, without a time limit.

    It is meant for rewards that use the policy's model, such as a reward model: a call abandoned after `time_limit_s`
    would leave the model switched to another role. An error of alignlab's own, such as a judge that answers nothing or
    a disk that is full, ends the run, which can be resumed, and does not count as a failed call; a value that is not
    finite does.
    """

    @abstractmethod
    def __call__(self, *args: Any, **arguments: Any) -> Any:
        """Return one value a completion, from the arguments of a reward function that the signature names."""

    def metrics(self) -> dict[str, float]:
        """Return the reward's own metrics so far, by name."""
        return {}

    def state(self) -> dict[str, Any]:
        """Return what the reward needs to go on after a step, as JSON; empty by default."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state`."""
        assert not state, "a reward with a state restores it"

    def joined(self, states: Sequence[Mapping[str, Any]], all_states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the state of a rank of a run that goes on on another number of ranks.

        Args:
            states: of the earlier ranks whose part this rank takes over, perhaps none.
            all_states: of all earlier ranks.
        """
        assert not any(all_states), "a reward with a state joins those of several ranks"
        return {}


def run_inline(function: Callable[[], Any]) -> Future[Any]:
    """Run a function in this thread, for as long as it takes, and return its outcome.

    Raises:
        AlignlabError: the function raised one, of another kind than a NumericsError.
    """
    future: Future[Any] = Future()
    try:
        future.set_result(function())
    except NumericsError as error:
        future.set_exception(RewardFailure("not finite", str(error)))
    except AlignlabError:
        raise
    except Exception as error:
        future.set_exception(error)
    return future


def run_in_thread(function: Callable[[], Any]) -> Future[Any]:
    """Run a function in a new daemon thread; a pool would lose a worker to every function that hangs."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()

    def work() -> None:
        try:
            result = function()
        except BaseException as error:  # even SystemExit must reach the waiting thread
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=work, name="alignlab-reward", daemon=True).start()
    return future


async def exits_as_failures(awaitable: Awaitable[Any]) -> Any:
    """Await a reward's result, and raise its attempt to end the process as a failure.

    SystemExit and KeyboardInterrupt would end the event loop, and every other reward that runs on it.

    Raises:
        RewardFailure: the awaitable raised SystemExit or KeyboardInterrupt.
    """
    try:
        return await awaitable
    except (SystemExit, KeyboardInterrupt) as error:
        raise RewardFailure("raised", describe_error(error)) from error


def is_async(function: Callable[..., Any]) -> bool:
    """Return whether a call returns a coroutine: of an async function, or an object whose `__call__` is one."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def private_copy(value: Any) -> Any:
    """Return a copy that a reward may modify.

    An object that cannot be copied, such as a lock or a client, is passed as it is, inside a copied container.
    """
    try:
        return copy.deepcopy(value)
    except Exception:  # a class may refuse to be copied with any error
        pass
    if type(value) is dict:
        return {key: private_copy(item) for key, item in value.items()}
    return type(value)(map(private_copy, value)) if type(value) in (list, tuple, set) else value

"""Reward functions in processes of their own: one that exits, crashes, hangs, prints or fills memory fails one call.

    training process -- {"name", "options", "memory_limit_bytes"} --> worker
                     <-- {"parameters", ...} or {"error"} ----------
                     -- {"number", "arguments", "count"} ---------->     for each call
                     <-- {"number", "values", ...} or {"failure"} --

The messages are JSON in two pipes. What the function prints goes into a third pipe, where it is counted and not shown.
This protects against accidents and not against attacks: the worker has the rights of the training process.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from typing import Any

from alignlab.config.rewards import RewardSettings
from alignlab.errors import ConfigError
from alignlab.scoring.calls import FAILURE_KINDS, RewardCall, RewardFailure, run_in_thread
from alignlab.scoring.isolated.child import Output, RewardChild
from alignlab.scoring.plugins import short_name
from alignlab.scoring.values import RewardValues

START_LIMIT_S = 120.0
"""Limit for a process to start and import the reward."""
DEFAULT_MEMORY_GIB = 4.0
_GIB = 2**30
_MAX_DESCRIPTION_BYTES = 1 << 20
_REPLY_BYTES, _BYTES_A_VALUE = 1 << 16, 32


def json_problem(value: Any) -> str | None:
    """Return the type of the first part of a value that JSON cannot hold; None if there is no such part.

    A tuple counts as a list.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return None
    if isinstance(value, list | tuple):
        return next(filter(None, map(json_problem, value)), None)
    if isinstance(value, dict):
        not_text = next((key for key in value if not isinstance(key, str)), None)
        return json_problem(list(value.values())) if not_text is None else f"a key of type {type(not_text).__name__}"
    return type(value).__name__


def not_json_message(reward: str, name: str, problem: str) -> str:
    """Return the message for an argument that JSON cannot hold."""
    return (
        f"reward {reward!r} runs in a process of its own, which is given JSON, and {name} holds {problem}; write the "
        "column as text, numbers or lists, or remove run_in: process"
    )


class IsolatedReward:
    """A reward function in a process, with the function's signature.

    Processes are started when they are needed, and again after one has ended. One idle process is kept for the next
    user.

    Args:
        settings: the name and options of the function, and the memory limit.

    Attributes:
        call_options: keyword arguments of every call.
        isolated_source: see `source_digest`.

    Raises:
        ConfigError: the function cannot be found or made, an option is unknown or no JSON, or the process does not
            start.
    """

    def __init__(self, settings: RewardSettings) -> None:
        problem = json_problem(settings.options)
        if problem is not None:
            raise ConfigError(
                f"the options of reward {settings.name!r} must be JSON where it runs in a process of its own, and hold "
                f"{problem}; write them as text, numbers and lists, or remove run_in: process"
            )
        self.settings = settings
        self.__name__ = short_name(settings.name)
        self._idle: list[RewardProcess] = []
        process = RewardProcess(settings)
        try:
            description = process.start()
        except RewardFailure as error:
            raise ConfigError(f"reward {settings.name!r} must start in a process of its own: {error}") from error
        self.return_process(process)
        self.__module__ = description["module"] or __name__
        self.isolated_source: str | None = description["source"]
        self.call_options: dict[str, Any] = {} if description["is_class"] else dict(settings.options)
        if description["parameters"] is not None:
            self.__signature__ = _signature(description["parameters"])

    def __call__(self, **arguments: Any) -> list[float | None]:
        """Call the function once, without a time limit.

        Raises:
            RewardFailure: the call failed.
        """
        process = self.borrow_process()
        try:
            result = process.call(arguments, len(arguments.get("completions", ())))
        finally:
            self.return_process(process)
        if result.failure is not None:
            raise result.failure
        return result.values

    def borrow_process(self) -> RewardProcess:
        """Return a process for one user, who returns it with `return_process`."""
        return self._idle.pop() if self._idle else RewardProcess(self.settings)

    def return_process(self, process: RewardProcess) -> None:
        """Keep one process for the next user; end any other."""
        if self._idle:
            process.end()
        else:
            self._idle.append(process)


class RewardProcess:
    """One process, from its start to its end; it may be started again. One call at a time.

    Attributes:
        output: what the function has printed, in all processes so far.
    """

    def __init__(self, settings: RewardSettings) -> None:
        self._settings = settings
        self._child: RewardChild | None = None
        self.output = Output()
        self._number = 0

    @property
    def is_running(self) -> bool:
        """True from the start of the process to its end."""
        return self._child is not None

    def start(self) -> dict[str, Any]:
        """Start the process, and return its description of the function.

        Raises:
            ConfigError: the process reports that there is no such function, or that an option is wrong.
            RewardFailure: the process has ended, or is not ready within `START_LIMIT_S`.
        """
        assert self._child is None
        child = self._child = RewardChild(self.output)
        limit = self._settings.memory_limit_gib or DEFAULT_MEMORY_GIB
        settings = {"name": self._settings.name, "options": self._settings.options}
        request = {**settings, "memory_limit_bytes": math.ceil(limit * _GIB)}
        future = run_in_thread(lambda: self._exchange(child, request, _MAX_DESCRIPTION_BYTES))
        try:
            description = RewardCall(future, START_LIMIT_S, self.end).result()
        except RewardFailure as error:
            if error.kind != "timeout":
                raise
            late = f"was not ready within {START_LIMIT_S:g} s; make its import quicker"
            raise RewardFailure("timeout", late) from None
        if "error" in description:
            self.end()
            raise ConfigError(str(description["error"]))
        return {"parameters": None, "module": None, "is_class": False, "source": None, **description}

    def call(self, arguments: Mapping[str, Any], count: int) -> RewardValues:
        """Call the function, for as long as it takes; `end` from another thread ends the call.

        Raises:
            RewardFailure: the call failed; after a crash the process is ended.
        """
        if self._child is None:
            self.start()
        child = self._child
        assert child is not None
        self._number += 1
        request = {"number": self._number, "arguments": arguments, "count": count}
        reply = self._exchange(child, request, _REPLY_BYTES + _BYTES_A_VALUE * count)
        try:
            return _values(reply, self._number, count)
        except RewardFailure as error:
            if error.kind in ("exited", "out of memory"):  # the function's state is unknown
                self.end()
            raise

    def end(self) -> None:
        """Kill the process, and all that the function has started in it."""
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def _exchange(self, child: RewardChild, request: Mapping[str, Any], limit: int) -> Any:
        """Send a request and return the reply, of at most `limit` bytes."""
        try:
            return child.exchange(request, limit)
        except (EOFError, OSError):
            reason = child.end_and_explain()
            self._child = None
            last = f"; the last that it printed: {self.output.tail}" if self.output.tail else ""
            raise RewardFailure("exited", f"its process {reason}{last}") from None
        except (ValueError, RecursionError) as error:
            self.end()
            problem = f"{type(error).__name__}: {str(error)[:200]}"
            raise RewardFailure("exited", f"its process wrote what is no reply ({problem}), and was ended") from None


def _signature(parameters: list[list[Any]]) -> inspect.Signature:
    kinds = list(inspect._ParameterKind)
    return inspect.Signature(
        [
            inspect.Parameter(name, kinds[kind], default=inspect.Parameter.empty if is_required else None)
            for name, kind, is_required in parameters
        ],
        __validate_parameters__=False,
    )


def _values(reply: Any, number: int, count: int) -> RewardValues:
    """Return the values of a reply, which may be anything, since the function can write to the worker's pipe.

    Raises:
        RewardFailure: the call failed, or the reply is not a reply to this call.
    """
    try:
        if reply["number"] != number:
            raise ValueError("to another call")
        if "failure" in reply:
            raise _failure(reply["failure"], count)
        values, num_unreadable, first = reply["values"], int(reply["num_unreadable"]), reply["first_failure"]
        if len(values) != count or not all(value is None or _is_finite(value) for value in values):
            raise ValueError("of other values")
        return RewardValues(values, num_unreadable, None if first is None else _failure(first, count))
    except (KeyError, TypeError, ValueError) as error:
        text = f"its process wrote what is no reply ({error!r:.100}: {json.dumps(reply)[:200]}), and was ended"
        raise RewardFailure("exited", text) from None


def _failure(description: Any, count: int) -> RewardFailure:
    kind, text, sample = description
    is_sample = isinstance(sample, int) and 0 <= sample < max(count, 1)
    if kind not in FAILURE_KINDS or not isinstance(text, str) or not is_sample:
        raise ValueError("of no known failure")
    return RewardFailure(kind, text, sample)


def _is_finite(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)

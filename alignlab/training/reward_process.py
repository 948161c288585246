"""Rewards in processes of their own: one that exits, crashes, hangs, prints or fills memory is a failed call.

    this process -- {"name", "options", "memory_limit_bytes"} --> reward_worker
                 <-- {"parameters", ...} or {"error"} ---------
                 -- {"number", "arguments", "count"} --------->     for each call
                 <-- {"number", "values", ...} or {"failure"} --

JSON through two pipes; what the function prints goes through a third, and is counted and never shown on this process's
output. This guards against accidents and not against attacks: the process has the rights of this one.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from alignlab.config.rewards import RewardSettings
from alignlab.errors import ConfigError
from alignlab.training.reward_calls import FAILURE_KINDS, RewardCall, RewardFailure, failed, in_thread
from alignlab.training.reward_child import Printed, RewardChild
from alignlab.training.reward_lookup import short_name
from alignlab.training.reward_values import RewardValues

logger = logging.getLogger(__name__)

START_LIMIT_S = 120.0
"""For a process to start and import the reward."""
DEFAULT_MEMORY_GIB = 4.0
_GIB = 2**30
_REPLY_BYTES, _BYTES_A_VALUE = 1 << 16, 32


def json_problem(value: Any) -> str | None:
    """Return the type of the first part of a value that JSON does not hold; None where it holds all. A tuple counts
    as a list."""
    if value is None or isinstance(value, str | bool | int | float):
        return None
    if isinstance(value, list | tuple):
        return next(filter(None, map(json_problem, value)), None)
    if isinstance(value, dict):
        other = next((key for key in value if not isinstance(key, str)), None)
        return json_problem(list(value.values())) if other is None else f"a key of type {type(other).__name__}"
    return type(value).__name__


class IsolatedReward:
    """A reward function of a process of its own, with the function's signature.

    Processes are started when they are needed, and again after one has ended; one that is not in use stays for the
    next call.

    Args:
        settings: how the function is found.

    Attributes:
        call_options: keyword arguments, passed on every call.
        isolated_source: see `reward_source`.

    Raises:
        ConfigError: it cannot be found or made, its options are unknown to it or no JSON, or it does not start.
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
            described = process.start()
        except RewardFailure as error:
            raise ConfigError(f"reward {settings.name!r} must start in a process of its own: {error}") from error
        self.give_back(process)
        self.__module__ = described["module"] or __name__
        self.isolated_source: str | None = described["source"]
        self.call_options: dict[str, Any] = {} if described["is_class"] else dict(settings.options)
        if described["parameters"] is not None:
            self.__signature__ = _signature(described["parameters"])

    def __call__(self, **arguments: Any) -> list[float | None]:
        """Call the function once, without a limit of time.

        Raises:
            RewardFailure: it failed.
        """
        process = self.take()
        try:
            values = process.call(arguments, len(arguments.get("completions", ())))
        finally:
            self.give_back(process)
        if values.failure is not None:
            raise values.failure
        return values.values

    def take(self) -> RewardProcess:
        """Return a process for one user, to be given back."""
        return self._idle.pop() if self._idle else RewardProcess(self.settings)

    def give_back(self, process: RewardProcess) -> None:
        """Keep one process for the next user; end any other."""
        if self._idle:
            process.end()
        else:
            self._idle.append(process)


class ProcessPlace:
    """A `CallPlace` in a process: it is ended when a call's time is over, and started again for the next call."""

    runs_beside = True

    def __init__(self, reward: IsolatedReward, name: str) -> None:
        self._reward, self._name = reward, name
        self._process: RewardProcess | None = None
        self._is_print_said = False

    def start(self, arguments: Mapping[str, Any], count: int, limit_s: float) -> RewardCall:
        """Call the function; where its process has ended, start another first, within `START_LIMIT_S`."""
        process = self._process = self._process or self._reward.take()
        problem = next(((name, found) for name, value in arguments.items() if (found := json_problem(value))), None)
        try:
            if problem is not None:
                raise RewardFailure("not JSON", unsendable(self._name, *problem))
            if not process.is_running:
                process.start()
        except RewardFailure as error:
            return RewardCall(failed(error), limit_s)
        return RewardCall(in_thread(lambda: process.call(arguments, count)), limit_s, process.end)

    def metrics(self) -> dict[str, float]:
        """Bytes that the function has printed, where it prints."""
        process = self._process
        if process is None or not process.printed.num_bytes:
            return {}
        if not self._is_print_said:
            self._is_print_said = True
            logger.warning(
                "reward %r prints, and its output is not shown; the last of it: %s", self._name, process.printed.tail
            )
        return {f"printed_bytes/{self._name}": float(process.printed.num_bytes)}

    def close(self) -> None:
        """Give the process back."""
        if self._process is not None:
            self._reward.give_back(self._process)
            self._process = None


def unsendable(reward: str, name: str, problem: str) -> str:
    """Return the message for an argument that is no JSON."""
    return (
        f"reward {reward!r} runs in a process of its own, which is given JSON, and {name} holds {problem}; write the "
        "column as text, numbers or lists, or remove run_in: process"
    )


class RewardProcess:
    """One process, from its start to its end; it may be started again. One call at a time."""

    def __init__(self, settings: RewardSettings) -> None:
        self._settings = settings
        self._worker: RewardChild | None = None
        self.printed = Printed()
        self._number = 0

    @property
    def is_running(self) -> bool:
        """Whether it was started and not ended."""
        return self._worker is not None

    def start(self) -> dict[str, Any]:
        """Start it, and return what it tells of the function.

        Raises:
            ConfigError: it says that there is no such function, or that an option is wrong.
            RewardFailure: it has ended, or is not ready within `START_LIMIT_S`.
        """
        assert self._worker is None
        worker = self._worker = RewardChild(self.printed)
        limit = self._settings.memory_limit_gib or DEFAULT_MEMORY_GIB
        settings = {"name": self._settings.name, "options": self._settings.options}
        request = {**settings, "memory_limit_bytes": math.ceil(limit * _GIB)}
        call = RewardCall(in_thread(lambda: self._exchange(worker, request, 1 << 20)), START_LIMIT_S, self.end)
        try:
            told = call.result()
        except RewardFailure as error:
            if error.kind != "timeout":
                raise
            late = f"was not ready within {START_LIMIT_S:g} s; make its import quicker"
            raise RewardFailure("timeout", late) from None
        if "error" in told:
            self.end()
            raise ConfigError(str(told["error"]))
        return {"parameters": None, "module": None, "is_class": False, "source": None, **told}

    def call(self, arguments: Mapping[str, Any], count: int) -> RewardValues:
        """Call the function, for as long as it takes; `end` from another thread ends the call.

        Raises:
            RewardFailure: it failed; the process has ended where it could not go on.
        """
        if self._worker is None:
            self.start()
        worker = self._worker
        assert worker is not None
        self._number += 1
        request = {"number": self._number, "arguments": arguments, "count": count}
        reply = self._exchange(worker, request, _REPLY_BYTES + _BYTES_A_VALUE * count)
        try:
            values = _values(reply, self._number, count)
        except RewardFailure as error:
            if error.kind in ("exited", "out of memory"):  # nothing can be said of its state
                self.end()
            raise
        return values

    def _exchange(self, worker: RewardChild, request: Mapping[str, Any], limit: int) -> Any:
        try:
            reply = worker.exchange(request, limit)
        except (EOFError, OSError):
            how = worker.ending()
            self._worker = None
            last = f"; the last that it printed: {self.printed.tail}" if self.printed.tail else ""
            raise RewardFailure("exited", f"its process {how}{last}") from None
        except (ValueError, RecursionError) as error:
            self.end()
            problem = f"{type(error).__name__}: {str(error)[:200]}"
            raise RewardFailure("exited", f"its process wrote what is no reply ({problem}), and was ended") from None
        return reply

    def end(self) -> None:
        """End it, and all that the function has started in it."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end()


def _signature(parameters: list[list[Any]]) -> inspect.Signature:
    kinds = list(inspect._ParameterKind)
    return inspect.Signature(
        [
            inspect.Parameter(name, kinds[kind], default=inspect.Parameter.empty if needed else None)
            for name, kind, needed in parameters
        ],
        __validate_parameters__=False,
    )


def _values(reply: Any, number: int, count: int) -> RewardValues:
    """The values of a reply, which may be anything: the function can write where its process does.

    Raises:
        RewardFailure: the call failed, or this is no reply to it.
    """
    try:
        if reply["number"] != number:
            raise ValueError("to another call")
        if "failure" in reply:
            raise _failure(reply["failure"], count)
        values, unread, first = reply["values"], int(reply["num_unread"]), reply["first_unread"]
        if len(values) != count or not all(value is None or _is_finite(value) for value in values):
            raise ValueError("of other values")
        return RewardValues(values, unread, None if first is None else _failure(first, count))
    except (KeyError, TypeError, ValueError) as error:
        text = f"its process wrote what is no reply ({error!r:.100}: {json.dumps(reply)[:200]}), and was ended"
        raise RewardFailure("exited", text) from None


def _failure(told: Any, count: int) -> RewardFailure:
    kind, text, sample = told
    is_sample = isinstance(sample, int) and 0 <= sample < max(count, 1)
    if kind not in FAILURE_KINDS or not isinstance(text, str) or not is_sample:
        raise ValueError("of no known failure")
    return RewardFailure(kind, text, sample)


def _is_finite(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)

"""The process of a reward's own: finds one function, and calls it on what comes through a pipe.

`reward_process` starts it and tells the protocol. This module imports nothing heavy: the process is as small as the
reward's own imports leave it.
"""

from __future__ import annotations

import asyncio
import faulthandler
import functools
import inspect
import json
import os
import resource
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from alignlab.errors import ConfigError
from alignlab.training.marked_processes import MARK, end_marked
from alignlab.training.reward_calls import CallerReward, RewardFailure, described, is_async
from alignlab.training.reward_lookup import check_call, check_options, find_function, made_function, parameters
from alignlab.training.reward_source import source_digest
from alignlab.training.reward_values import read_values

_LENGTH = struct.Struct(">Q")
_LOOK_S = 1.0
_MARK = os.environ.get(MARK)


def write_frame(pipe: int, message: Mapping[str, Any]) -> None:
    """Write a message as JSON, behind its length in bytes."""
    data = json.dumps(message).encode()
    data = _LENGTH.pack(len(data)) + data
    view = memoryview(data)
    while view:
        view = view[os.write(pipe, view) :]


def read_frame(pipe: int, limit: int) -> Any:
    """Read a message that `write_frame` wrote.

    Args:
        limit: bytes that it may have.

    Raises:
        EOFError: the other end is closed.
        ValueError, RecursionError: it is longer than the limit, or no JSON.
    """
    (length,) = _LENGTH.unpack(_read(pipe, _LENGTH.size))
    if length > limit:
        raise ValueError(f"a message of {length} bytes is longer than {limit}")
    return json.loads(_read(pipe, length))


def _read(pipe: int, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = os.read(pipe, min(count - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def main() -> None:
    """Serve one reward function until the other end closes. Arguments: pipes to read and write, the parent's id."""
    requests, replies, parent = map(int, sys.argv[1:])
    for pipe in (requests, replies):  # a child that lives on must not keep them open
        os.set_inheritable(pipe, False)
        os.register_at_fork(after_in_child=functools.partial(os.close, pipe))
    faulthandler.enable()
    _end_with(parent)
    try:
        settings = read_frame(requests, sys.maxsize)
        _limit_memory(settings["memory_limit_bytes"])
        function = _load(settings, replies)
        while function is not None:
            request = read_frame(requests, sys.maxsize)
            reply = _called(function, request["arguments"], request["count"])
            sys.stdout.flush()
            sys.stderr.flush()
            write_frame(replies, {"number": request["number"], **reply})
    except (EOFError, BrokenPipeError):  # the parent is gone
        _end_all()


def _end_with(parent: int) -> None:
    """End this process, and all that the reward has started, once the parent is gone, however it ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_S)
        _end_all()

    threading.Thread(target=watch, name="alignlab-parent", daemon=True).start()


def _end_all() -> None:
    """End this process, and all that the reward has started in it."""
    if _MARK is not None:
        end_marked(_MARK)
    os.killpg(0, signal.SIGKILL)


def _limit_memory(limit_bytes: int) -> None:
    """Let allocations beyond a limit fail; a crash leaves no file of the memory."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def _load(settings: Mapping[str, Any], replies: int) -> Callable[..., Any] | None:
    """Find the function, and tell its signature; or why there is none."""
    name, options = settings["name"], settings["options"]
    try:
        found = find_function(name)
        if not callable(found):
            raise ConfigError(f"reward {name!r} must be a function, and is {type(found).__name__}")
        if isinstance(found, type) and issubclass(found, CallerReward):
            raise ConfigError(_not_here(name))
        check_options(name, found, options)
        function = made_function(name, found, options)
        check_call(name, function)
        if isinstance(function, CallerReward):
            raise ConfigError(_not_here(name))
        known = parameters(function)
    except ConfigError as error:
        write_frame(replies, {"error": str(error)})
        return None
    except BaseException as error:  # a class may raise anything when it is made
        write_frame(replies, {"error": f"reward {name!r} cannot be made: {described(error)}; correct it"})
        return None
    described_parameters = known and [
        [key, int(parameter.kind), parameter.default is parameter.empty] for key, parameter in known.items()
    ]
    module = getattr(function, "__module__", None)
    told = {"parameters": described_parameters, "module": module, "is_class": inspect.isclass(found)}
    write_frame(replies, {**told, "source": source_digest(function)})
    return function


def _not_here(name: str) -> str:
    return f"reward {name!r} runs in the training's process; remove run_in: process"


def _called(function: Callable[..., Any], arguments: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The reply to one call."""
    try:
        values = read_values(_result(function, arguments), count)
    except RewardFailure as error:
        return {"failure": _plain(error)}
    except MemoryError as error:
        return {"failure": ["out of memory", described(error), 0]}
    except BaseException as error:  # SystemExit, too
        return {"failure": ["raised", described(error), 0]}
    failure = values.failure and _plain(values.failure)
    return {"values": values.values, "num_unread": values.num_unread, "first_unread": failure}


def _result(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    result = function(**arguments)
    if not (is_async(function) or inspect.isawaitable(result)):
        return result
    return _loop().run_until_complete(result)


def _loop() -> asyncio.AbstractEventLoop:
    """The event loop, which lives on between calls, so that connections may be kept open."""
    global _event_loop
    if _event_loop is None:
        _event_loop = asyncio.new_event_loop()
        asyncio.set_event_loop(_event_loop)
    return _event_loop


_event_loop: asyncio.AbstractEventLoop | None = None


def _plain(failure: RewardFailure) -> list[Any]:
    return [failure.kind, str(failure), failure.sample]


if __name__ == "__main__":
    main()

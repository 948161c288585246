"""Main program of a reward's process: imports one function, and calls it with the arguments that arrive in a pipe.

`scoring.isolated.reward` starts this program and documents the protocol. The program imports nothing heavy, so that the
process needs little more memory than the reward itself.
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
from alignlab.scoring.calls import InlineReward, RewardFailure, describe_error, is_async
from alignlab.scoring.isolated.descendants import MARK, end_marked
from alignlab.scoring.plugins import check_call, check_options, find_function, instantiate, parameters
from alignlab.scoring.source_digest import source_digest
from alignlab.scoring.values import read_values

_LENGTH = struct.Struct(">Q")
_POLL_S = 1.0
_MARK = os.environ.get(MARK)


def write_frame(pipe: int, message: Mapping[str, Any]) -> None:
    """Write a message as JSON, preceded by its length in bytes."""
    data = json.dumps(message).encode()
    data = _LENGTH.pack(len(data)) + data
    view = memoryview(data)
    while view:
        view = view[os.write(pipe, view) :]


def read_frame(pipe: int, limit: int) -> Any:
    """Read a message that `write_frame` wrote.

    Args:
        pipe: the pipe to read from.
        limit: longest message, in bytes.

    Raises:
        EOFError: the other end is closed.
        ValueError, RecursionError: the message is longer than the limit, or no JSON.
    """
    (length,) = _LENGTH.unpack(_read(pipe, _LENGTH.size))
    if length > limit:
        raise ValueError(f"a message of {length} bytes is longer than {limit}")
    return json.loads(_read(pipe, length))


def _read(pipe: int, count: int) -> bytes:
    content = bytearray()
    while len(content) < count:
        block = os.read(pipe, min(count - len(content), 1 << 20))
        if not block:
            raise EOFError
        content += block
    return bytes(content)


def main() -> None:
    """Serve one reward function until the pipe is closed.

    Arguments of the program: the pipe to read, the pipe to write, the parent's process id.
    """
    requests, replies, parent = map(int, sys.argv[1:])
    for pipe in (requests, replies):  # a child that outlives this process must not keep them open
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
            reply = _reply(function, request["arguments"], request["count"])
            sys.stdout.flush()
            sys.stderr.flush()
            write_frame(replies, {"number": request["number"], **reply})
    except (EOFError, BrokenPipeError):  # the parent is gone
        _end_all()


def _end_with(parent: int) -> None:
    """Kill this process and all that the reward has started once the parent has ended, for whatever reason."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_S)
        _end_all()

    threading.Thread(target=watch, name="alignlab-parent", daemon=True).start()


def _end_all() -> None:
    """Kill this process and all that the reward has started in it."""
    if _MARK is not None:
        end_marked(_MARK)
    os.killpg(0, signal.SIGKILL)


def _limit_memory(limit_bytes: int) -> None:
    """Make allocations beyond a limit fail; a crash writes no core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def _load(settings: Mapping[str, Any], replies: int) -> Callable[..., Any] | None:
    """Import the function and send its signature; None, with the error sent, where that fails."""
    name, options = settings["name"], settings["options"]
    try:
        target = find_function(name)
        if not callable(target):
            raise ConfigError(f"reward {name!r} must be a function, and is {type(target).__name__}")
        if isinstance(target, type) and issubclass(target, InlineReward):
            raise ConfigError(_inline_message(name))
        check_options(name, target, options)
        function = instantiate(name, target, options)
        check_call(name, function)
        if isinstance(function, InlineReward):
            raise ConfigError(_inline_message(name))
        signature = parameters(function)
    except ConfigError as error:
        write_frame(replies, {"error": str(error)})
        return None
    except BaseException as error:  # a constructor may raise anything
        write_frame(replies, {"error": f"reward {name!r} cannot be made: {describe_error(error)}; correct it"})
        return None
    parameter_list = signature and [
        [key, int(parameter.kind), parameter.default is parameter.empty] for key, parameter in signature.items()
    ]
    description = {
        "parameters": parameter_list,
        "module": getattr(function, "__module__", None),
        "is_class": inspect.isclass(target),
        "source": source_digest(function),
    }
    write_frame(replies, description)
    return function


def _inline_message(name: str) -> str:
    return f"reward {name!r} runs in the training's process; remove run_in: process"


def _reply(function: Callable[..., Any], arguments: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Call the function and return the reply."""
    try:
        values = read_values(_result(function, arguments), count)
    except RewardFailure as error:
        return {"failure": _plain(error)}
    except MemoryError as error:
        return {"failure": ["out of memory", describe_error(error), 0]}
    except BaseException as error:  # SystemExit, too
        return {"failure": ["raised", describe_error(error), 0]}
    failure = values.failure and _plain(values.failure)
    return {"values": values.values, "num_unreadable": values.num_unreadable, "first_failure": failure}


def _result(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    result = function(**arguments)
    if not (is_async(function) or inspect.isawaitable(result)):
        return result
    return _loop().run_until_complete(result)


def _loop() -> asyncio.AbstractEventLoop:
    """Return the event loop, which lives on between calls, so that connections can be kept open."""
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

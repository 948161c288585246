"""A process that has imported everything once, and forks a child for each request: a tiny run takes a second.

    python -m tests.faults.server     (requests and answers are lines of JSON)

A child has its own session, so that it ends with all that it started. Changes that it makes to files are watched from
here, see `watch`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tests.faults.calls import install
from tests.faults.operations import Plan
from tests.faults.watch import Watcher

_READ = 1 << 16
_MAX_OUTPUT = 1 << 20
_MIB = 1 << 20


@dataclass
class Child:
    """One rank of a request.

    Attributes:
        text, outcome: what it printed, and what its task came to.
        status: as `os.waitstatus_to_exitcode` has it; None while it runs.
        was_ended: by us, for it did not end by itself.
        memory_mib: that it held at most.
    """

    process: int
    text: bytearray = field(default_factory=bytearray)
    outcome: bytearray = field(default_factory=bytearray)
    watcher: Watcher | None = None
    status: int | None = None
    was_ended: bool = False
    memory_mib: int = 0


def main() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        reply: Any = [_import(name) for name in request["preload"]] if "preload" in request else answer(request)
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def answer(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a request on its ranks, and say how each ended: status, outcome, text."""
    handlers: dict[int, Callable[[int], bool]] = {}
    children = [_start(request, rank, handlers) for rank in range(request.get("ranks", 1))]
    _wait(children, handlers, request["timeout_s"], request.get("grace_s", 0.0))
    answers = []
    for child in children:
        told = json.loads(child.outcome) if child.outcome.endswith(b"\n") else {}
        told |= {"status": child.status, "ended": child.was_ended, "text": child.text.decode(errors="replace")}
        told |= {"operations": child.watcher.count if child.watcher else 0, "memory_mib": child.memory_mib}
        answers.append(told)
    return answers


def _start(request: dict[str, Any], rank: int, handlers: dict[int, Callable[[int], bool]]) -> Child:
    """Fork a child, and note what is done when a descriptor of its has something to read."""
    (text, text_end), (outcome, outcome_end), (ours, theirs) = os.pipe(), os.pipe(), socket.socketpair()
    process = os.fork()
    if process == 0:
        _be_child(request, rank, text_end, outcome_end, theirs)
    for end in (text_end, outcome_end):
        os.close(end)
    theirs.close()
    child = Child(process)
    handlers[text] = lambda descriptor: _read(descriptor, child.text)
    handlers[outcome] = lambda descriptor: _read(descriptor, child.outcome)
    handlers[os.pidfd_open(process)] = lambda _: _collect(child)
    _, listeners, _, _ = socket.recv_fds(ours, 1, 1)
    ours.close()
    for listener in listeners:
        is_armed = rank == request.get("armed_rank", 0)
        plan = Plan(**request.get("plan", {})) if is_armed else Plan()
        log = open(f"{request['log']}.{rank}", "wb", buffering=0) if "log" in request else None  # noqa: SIM115
        child.watcher = Watcher(listener, process, Path(request["root"]), plan, log)
        handlers[listener] = child.watcher.answer
    return child


def _be_child(request: dict[str, Any], rank: int, text: int, outcome: int, parent: socket.socket) -> NoReturn:
    """Do what is asked for, and end."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(text, 1)
    os.dup2(text, 2)
    os.environ.update(request.get("environment", {}))
    if request.get("ranks", 1) > 1:
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
    told: dict[str, Any]
    try:
        os.chdir(request["root"])
        if rank == request.get("armed_rank", 0):
            _limit_files(request.get("plan", {}).get("file_bytes"))
        listener = install() if request["watched"] else None
        socket.send_fds(parent, [b"x"], [] if listener is None else [listener])
        parent.close()
        if listener is not None:
            os.close(listener)
        told = {"value": _called(request)}
    except BaseException:
        told = {"traceback": traceback.format_exc()}
    sys.stdout.flush()
    sys.stderr.flush()
    with os.fdopen(outcome, "w") as file:
        file.write(json.dumps(told) + "\n")
    os._exit(_exit_status(told))


def _exit_status(told: dict[str, Any]) -> int:
    """1 where the work failed: a launcher ends the other ranks then."""
    value = told.get("value")
    return int("traceback" in told or (isinstance(value, dict) and value.get("exit", 0) != 0))


def _limit_files(num_bytes: int | None) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if num_bytes is None else num_bytes, most))


def _called(request: dict[str, Any]) -> Any:
    module, _, name = request["call"].partition(":")
    return getattr(importlib.import_module(module), name)(**request.get("arguments", {}))


def _wait(
    children: list[Child], handlers: dict[int, Callable[[int], bool]], timeout_s: float, grace_s: float
) -> None:
    """Handle what comes from the children until all have ended, or the time is over.

    Once one has failed, the others have `grace_s` to end by themselves: as a launcher does, all are ended then.
    """
    until = time.monotonic() + timeout_s
    poll = select.poll()
    for descriptor in handlers:
        poll.register(descriptor, select.POLLIN)
    failed = False
    while handlers:
        ready = poll.poll(1000 * max(until - time.monotonic(), 0))
        if not ready:
            _end_all(children)
            until = time.monotonic() + timeout_s
        for descriptor, events in ready:
            if not events & select.POLLIN or not handlers[descriptor](descriptor):
                poll.unregister(descriptor)
                os.close(descriptor)
                del handlers[descriptor]
        if not failed and any(child.status not in (None, 0) for child in children):
            failed, until = True, min(until, time.monotonic() + grace_s)


def _read(descriptor: int, output: bytearray) -> bool:
    block = os.read(descriptor, _READ)
    output += block[: max(_MAX_OUTPUT - len(output), 0)]
    return bool(block)


def _collect(child: Child) -> bool:
    _, status, usage = os.wait4(child.process, 0)
    child.status = os.waitstatus_to_exitcode(status)
    child.memory_mib = usage.ru_maxrss * 1024 // _MIB
    _end_session(child)
    return False


def _end_all(children: list[Child]) -> None:
    for child in children:
        if child.status is None:
            child.was_ended = True
            _end_session(child)


def _end_session(child: Child) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.process, signal.SIGKILL)


def _import(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:  # of any package: a child imports what it needs itself
        return False
    return True


if __name__ == "__main__":
    main()

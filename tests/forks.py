"""Processes forked from one that has imported everything once: a new interpreter takes seconds, with vLLM many.

A fork has the seed of its parent's string hashes, so all forks of a server iterate over a set in one order.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

from tests.quick import be_quick


class Fork:
    """A forked process that runs a Python program; as `subprocess.Popen`.

    Args:
        server: forks it.
        arguments: path of a script, or -m and the name of a module; then the program's arguments.
        environment: all variables of the process.
        outputs: files of standard output and standard error; without them they are the server's.

    Attributes:
        pid: number of the process, which leads a session of its own.
        sentinel: descriptor that can be read once the process has ended.
    """

    def __init__(
        self, server: ForkServer, arguments: Sequence[str], environment: Mapping[str, str],
        outputs: tuple[Path, Path] | None = None,
    ) -> None:
        self._outputs = outputs
        job = (server.preloaded, list(arguments), dict(environment), outputs)
        self._process = ForkServerProcess(target=_run, args=job)
        server.start(self._process)
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.sentinel = self._process.sentinel

    @property
    def returncode(self) -> int | None:
        """Exit status, or the negative number of the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return `returncode`."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end, and return the exit status."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("fork", timeout or 0.0)
        return self._process.exitcode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for the end, and return standard output and standard error."""
        self.wait(timeout)
        assert self._outputs is not None
        stdout, stderr = (path.read_text(errors="replace") for path in self._outputs)
        return stdout, stderr

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, unless it has ended."""
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask the process to end."""
        self._process.terminate()

    def kill(self) -> None:
        """End the process now."""
        self._process.kill()
        self._process.join()


class ForkServer:
    """A process that forks others; it starts with the first of them, and ends with this process.

    Args:
        preloaded: names of modules.
        optional: names of more modules, which may not be installed.
    """

    def __init__(self, *preloaded: str, optional: Sequence[str] = ()) -> None:
        self.preloaded = preloaded
        self._server = multiprocessing.forkserver.ForkServer()
        self._server.set_forkserver_preload([*preloaded, *optional])
        self._is_ready = False

    @staticmethod
    def make_ready(servers: Sequence[ForkServer]) -> None:
        """Return once each of the servers has imported what it preloads, all at the same time."""
        waiting = [server for server in servers if not server._is_ready]
        for server in waiting:
            server._server.ensure_running()
        for server in waiting:
            process = ForkServerProcess(target=_do_nothing)
            server.start(process)
            process.join()
            server._is_ready = True

    def start(self, process: Any) -> None:
        """Call `process.start`, so that it forks this server; `multiprocessing` itself has one for all."""
        connect = self._server.connect_to_new_process
        with mock.patch.object(multiprocessing.forkserver, "connect_to_new_process", connect):
            process.start()


def _do_nothing() -> None:
    """Be forked, and end."""


def _run(
    preloaded: Sequence[str], arguments: list[str], environment: dict[str, str], outputs: tuple[Path, Path] | None
) -> None:
    """Be the program, in the forked process."""
    missing = [name for name in preloaded if name not in sys.modules]
    assert not missing, f"the fork server could not import {missing}"  # it says nothing about that
    gc.freeze()  # no collection looks through what was imported
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in zip((1, 2), outputs or (), strict=False):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    be_quick()
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    finally:  # what an interpreter does at its end, and a fork of `multiprocessing` does not
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()

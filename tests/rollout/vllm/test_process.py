"""Server processes are restarted when they end, given up when they end too often, and never left behind.

The stand-in for a server answers at /health, and has a child process, as vLLM has.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from alignlab.errors import RolloutError
from alignlab.rollout.vllm import launch
from alignlab.rollout.vllm.launch import ServerProcess, keep_running
from tests.rollout.vllm.conftest import free_address

STAND_IN = """
import http.server, os, pathlib, subprocess, sys
port, notes = int(sys.argv[1]), pathlib.Path(sys.argv[2])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with notes.open("a") as file:
    file.write(f"{os.getpid()} {child.pid}\\n")
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args):
        pass
http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""


class Enough(Exception):
    """The test can end."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_PAUSE_S", 0.05)


def stand_in(tmp_path: Path, script: str = STAND_IN) -> tuple[ServerProcess, Callable[[], list[list[int]]]]:
    """Return a server, and a function that returns [process id, child's id] of each of its starts."""
    address = free_address()
    notes = tmp_path / f"{address.rpartition(':')[2]}.txt"
    command = [sys.executable, "-c", script, address.rpartition(":")[2], str(notes)]

    def starts() -> list[list[int]]:
        return [[int(number) for number in line.split()] for line in notes.read_text().splitlines()]

    return ServerProcess(address, command, dict(os.environ)), starts


def gone(*pids: int) -> bool:
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def test_a_server_that_dies_is_restarted_and_its_child_killed(tmp_path: Path) -> None:
    server, starts = stand_in(tmp_path)
    messages: list[str] = []

    def report(text: str) -> None:
        messages.append(text)
        if messages.count(f"{server.address} is up") == 2:
            assert gone(*starts()[0])  # the first one's child too
            raise Enough
        if "is up" in text:
            os.kill(starts()[0][0], signal.SIGKILL)

    with pytest.raises(Enough):
        keep_running([server], report)
    assert messages[1] == f"{server.address} ended with status -9; starting it again"
    assert len(starts()) == 2 and gone(*starts()[1])


def test_a_server_that_dies_too_often_is_given_up_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "MAX_RESTARTS", 1)
    (bad, of_bad), (good, of_good) = stand_in(tmp_path), stand_in(tmp_path)
    messages: list[str] = []

    def report(text: str) -> None:
        messages.append(text)
        if text == f"{bad.address} is up":
            os.kill(of_bad()[-1][0], signal.SIGKILL)
        if "given up" in text:
            assert good.process is not None and good.process.poll() is None
            raise Enough

    with pytest.raises(Enough):
        keep_running([good, bad], report)
    assert messages[-1] == f"{bad.address} ended with status -9, after 1 restarts; it is given up"
    assert len(of_bad()) == 2 and len(of_good()) == 1 and gone(*of_good()[0])


def test_a_server_that_ends_before_it_is_up_is_an_error(tmp_path: Path) -> None:
    server, _ = stand_in(tmp_path, "import sys; sys.exit(3)")
    with pytest.raises(RolloutError, match=f"the server {server.address} ended with status 3 before it was up"):
        keep_running([server], lambda text: None)


def test_a_server_that_does_not_answer_is_restarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, starts = stand_in(tmp_path)
    messages: list[str] = []

    def report(text: str) -> None:
        messages.append(text)
        if "starting it again" in text:
            raise Enough
        monkeypatch.setattr(launch, "UNHEALTHY_S", 0.2)
        monkeypatch.setattr(ServerProcess, "is_healthy", lambda self: False)

    with pytest.raises(Enough):
        keep_running([server], report)
    assert messages[-1] == f"{server.address} did not answer for 0.2 s; starting it again"
    assert gone(*starts()[0])

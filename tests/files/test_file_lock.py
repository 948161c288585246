"""Who waits for another process says so, and gives up in the end."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from alignlab.errors import DeadlineError, DiskError
from alignlab.files import file_lock
from alignlab.files.file_lock import one_at_a_time

HOLD = """
import pathlib, sys
from alignlab.files.file_lock import one_at_a_time
with one_at_a_time(pathlib.Path(sys.argv[1]), "x"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of `tmp_path / "made"` until its standard input ends."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "made")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_waiting_process_names_the_holder_and_continues_after_it(
    holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(file_lock, "_NOTICE_S", 0.01)
    warn = file_lock.logger.warning

    def end_the_holder(*args: object) -> None:
        warn(*args)
        holder.kill()

    monkeypatch.setattr(file_lock.logger, "warning", end_the_holder)
    with one_at_a_time(tmp_path / "made", "makes it"):
        assert f"waiting for process {holder.pid} on " in caplog.text and "which makes it" in caplog.text
    with one_at_a_time(tmp_path / "made", "makes it"):
        pass  # free again


def test_a_wait_ends_with_an_error_that_names_the_holder(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    expected = rf"waited 0 s for process {holder.pid} on .*, which makes it and holds .*made\.lock; end that process"
    with pytest.raises(DeadlineError, match=expected), one_at_a_time(tmp_path / "made", "makes it", longest_s=0.05):
        pass


def test_waiting_for_a_stopped_holder_ends_earlier(
    holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_lock, "_NOTICE_S", 0.01)
    monkeypatch.setattr(file_lock, "LONGEST_STOPPED_S", 0.05)
    holder.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, holder.pid, os.WSTOPPED | os.WNOWAIT)
    expected = r"\(stopped\), which makes it"
    with pytest.raises(DeadlineError, match=expected), one_at_a_time(tmp_path / "made", "makes it"):
        pass


def test_a_lock_that_cannot_be_made_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "no").write_text("")
    with pytest.raises(DiskError, match="a lock cannot be written to"), one_at_a_time(tmp_path / "no" / "x", "y"):
        pass


def test_a_filesystem_without_locks_is_a_named_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(file_lock.fcntl, "flock", refuse)
    expected = "Function not implemented; the filesystem refuses locks"
    with pytest.raises(DiskError, match=expected), one_at_a_time(tmp_path / "made", "makes it"):
        pass


@pytest.mark.parametrize(
    "left", [b'{"pid": 1, "host": "elsewhere"}', b'{"pid": 4194304, "host": "here"}', b"", b"\xff"]
)
def test_a_lock_file_that_a_dead_process_or_another_machine_left_stops_nobody(left: bytes, tmp_path: Path) -> None:
    (tmp_path / "made.lock").write_bytes(left)
    with one_at_a_time(tmp_path / "made", "makes it", longest_s=0.0):
        assert json.loads((tmp_path / "made.lock").read_bytes())["pid"] == os.getpid()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_a_folder_in_place_of_a_lock_is_a_named_error(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "made.lock")
    expected = r"a lock cannot be written to .*made\.lock"
    with pytest.raises(DiskError, match=expected), one_at_a_time(tmp_path / "made", "makes it"):
        pass


def test_an_error_in_the_context_passes_and_frees_the_lock(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(OSError, match="mine"), one_at_a_time(tmp_path / "made", "makes it", longest_s=0.05):
            raise OSError("mine")

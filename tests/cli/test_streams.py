"""The command's process: standard streams that are closed, full or broken, a working folder that is gone, SIGTERM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alignlab.cli import main

PROGRESS = 'from rich.console import Console; Console(stderr=True).print("step 1")'
SCRIPT = """
import logging, os, signal, sys
import alignlab.cli as cli
from alignlab.cli.ending import print_closing_line

def run(args):
    {work}
    logging.getLogger("test").warning("a warning")
    file = open({path!r}, "w")
    print_closing_line({{"learnt": True}})
    return 0 if file.fileno() > 2 else 9

cli.train.run = run
sys.argv = ["alignlab", "train", "run.yaml"]
sys.exit(cli.main())
"""


def command(tmp_path: Path, redirection: str = "", work: str = PROGRESS, **streams: Any) -> Any:
    """Run `alignlab train` in a process of its own, with work in place of a run."""
    script = SCRIPT.format(work=work, path=str(tmp_path / "file"))
    words = ["bash", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, script]
    return subprocess.run(words, text=True, timeout=120, check=False, **streams)


def readerless() -> int:
    """The end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_a_run_goes_on_without_streams(redirection: str, tmp_path: Path) -> None:
    """No file of the run gets a stream's number either."""
    done = command(tmp_path, redirection, capture_output=True)
    assert done.returncode == 0, done.stderr
    if ">&-" not in redirection.replace("2>&-", ""):
        assert json.loads(done.stdout) == {"learnt": True}


def test_a_run_goes_on_where_nobody_reads_its_progress(tmp_path: Path) -> None:
    writer = readerless()
    done = command(tmp_path, stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    assert (done.returncode, json.loads(done.stdout)) == (0, {"learnt": True})


def test_a_closing_line_that_is_lost_is_said(tmp_path: Path) -> None:
    writer = readerless()
    broken = command(tmp_path, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    full = command(tmp_path, ">/dev/full", stderr=subprocess.PIPE)
    for done, reason in ((broken, "Broken pipe"), (full, "No space left on device")):
        assert done.returncode == 2, done.stderr
        assert done.stderr.endswith(
            f"alignlab: standard output could not be written, and lacks a part: {reason}\n"
        )


def test_children_may_write_where_nobody_reads(tmp_path: Path) -> None:
    """Once the process has seen it: SIGPIPE would end them."""
    child = f"{PROGRESS}; sys.exit(os.system('echo a line >&2') or run_over())"
    writer = readerless()
    done = command(tmp_path, work=child.replace("run_over()", "7"), stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    assert done.returncode == 7


def test_sigterm_ends_a_command_as_ctrl_c_does(tmp_path: Path) -> None:
    work = "\n    ".join((
        "try: os.kill(os.getpid(), signal.SIGTERM)",
        "finally: print('closed', file=sys.stderr)",
    ))
    done = command(tmp_path, work=work, capture_output=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "closed\nalignlab train: interrupted by SIGTERM\n"


def test_a_second_sigterm_ends_the_process_at_once(tmp_path: Path) -> None:
    work = "\n    ".join((
        "try: os.kill(os.getpid(), signal.SIGTERM)",
        "finally: os.kill(os.getpid(), signal.SIGTERM)",
    ))
    assert command(tmp_path, work=work, capture_output=True).returncode == -15


def test_a_working_folder_that_is_gone_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    assert "the working folder must be there, and it was removed" in capsys.readouterr().err

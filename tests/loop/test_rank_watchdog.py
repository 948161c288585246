"""Two ranks of which one fails, is killed, stopped or hangs: the other one names the lost rank, saves and ends."""

from __future__ import annotations

import re
import signal
import socket
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.forks import Fork
from tests.ranks import ROOT, launcher_store, start_ranks

WATCHED, TRAINING = "rank_watched.py", "rank_faults.py"
pytestmark = pytest.mark.distributed


def two_ranks(
    script: str, folder: Path, port: int, *arguments: str, agent: bool = True
) -> AbstractContextManager[list[Fork]]:
    """Start a script of this room on both ranks; see `start_ranks`."""
    return start_ranks([str(ROOT / "tests/loop" / script), str(folder), *arguments], port, agent=agent)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("kill", "has ended without a word"),
        ("stop", r"is stopped, by SIGSTOP or a debugger, and has said nothing for \d+ s"),
        ("hang", r"does not get on; .* stood at .*/rank_watched.py:\d+ \(fail\) for \d+ s"),
        ("raise", "failed: AlignlabError: broken on purpose"),
    ],
)
def test_lost_rank_is_named_and_the_other_saves_and_ends(how: str, message: str, tmp_path: Path) -> None:
    timeout_s = "3" if how in ("hang", "stop") else "60"
    with launcher_store() as port, two_ranks(WATCHED, tmp_path, port, "1", how, "score", timeout_s) as (main, lost):
        _, output = main.communicate(timeout=120)
        lost.send_signal(signal.SIGCONT)
        _, lost_output = lost.communicate(timeout=120)
    assert main.returncode == 2 and lost.returncode == (-signal.SIGKILL if how == "kill" else 2)
    assert re.search(rf"rank 1 \(process {lost.pid} on [^;]+; step 3, score\) {message}", output), output
    assert "Traceback" not in output and "gloo" not in output, output
    assert [path.name for path in tmp_path.iterdir()] == ["saved by 0"]
    if how in ("stop", "hang"):
        assert re.search(rf"rank 1 \(process {lost.pid} ", lost_output), lost_output


@pytest.mark.parametrize(
    ("how", "message"), [("raise", "failed: AlignlabError: broken"), ("kill", "has ended without")]
)
def test_rank_lost_during_set_up_is_named(how: str, message: str, tmp_path: Path) -> None:
    with launcher_store() as port, two_ranks(WATCHED, tmp_path, port, "1", how, "set-up", "60") as (main, lost):
        _, output = main.communicate(timeout=120)
    assert main.returncode == 2
    assert re.search(rf"rank 1 \(process {lost.pid} on [^;]+; set-up\) {message}", output), output
    assert "Traceback" not in output and "gloo" not in output, output


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_loss_of_rank_0_with_the_store_is_named(how: str, tmp_path: Path) -> None:
    with two_ranks(WATCHED, tmp_path, free_port(), "0", how, "sync", "3", agent=False) as (_, other):
        _, output = other.communicate(timeout=120)
    assert other.returncode == 2
    assert re.search(r"rank 0 \(process \d+ on [^;]+; (set-up|step 3, sync)\) (has ended|is stopped)", output), output
    assert not list(tmp_path.iterdir())


def test_training_with_a_hanging_rank_saves_its_last_complete_step(tmp_path: Path) -> None:
    with launcher_store() as port, two_ranks(TRAINING, tmp_path, port, "1", "hang", "3") as (main, lost):
        _, output = main.communicate(timeout=120)
        lost.communicate(timeout=120)
    message = r"step 2, evaluate\) does not get on; .* stood at .*/rank_watched.py:\d+ \(fail\)"
    assert main.returncode == 2 and re.search(rf"rank 1 \(process {lost.pid} on [^;]+; {message}", output), output
    assert "Traceback" not in output and "gloo" not in output, output
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]

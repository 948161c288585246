import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import alignlab
from alignlab.errors import ConfigError
from alignlab.training.run_folder import RunFolder, source_commit

HOLD = """
import sys
from pathlib import Path
from alignlab.training.run_folder import RunFolder
run = RunFolder(Path(sys.argv[1]), resume=False, config_text="a: 1")
print("ready", flush=True)
sys.stdin.read()
"""

FORK = """
import os, sys
from pathlib import Path
from alignlab.training.run_folder import RunFolder
run = RunFolder(Path(sys.argv[1]), resume=False)
if os.fork() == 0:
    print("ready", flush=True)
sys.stdin.read()
"""


def hold(folder: Path, script: str = HOLD) -> subprocess.Popen[str]:
    """Another process with a live run in the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_second_live_run_is_refused_and_a_killed_one_frees_the_folder(tmp_path: Path) -> None:
    process = hold(tmp_path)
    try:
        for resume in (False, True):
            with pytest.raises(ConfigError, match=rf"is in use by process {process.pid} on ") as caught:
                RunFolder(tmp_path, resume=resume)
            assert "choose another trainer.output_dir" in str(caught.value)
    finally:
        end(process)
    with RunFolder(tmp_path, resume=True, config_text="a: 1"):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_forked_child_that_outlives_a_killed_run_does_not_keep_the_lock(tmp_path: Path) -> None:
    process = hold(tmp_path, FORK)
    try:
        process.kill()
        process.wait()
        with RunFolder(tmp_path, resume=True) as run:
            assert (run.path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    finally:
        process.communicate()


def test_a_second_run_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path, resume=False), pytest.raises(ConfigError, match="in use by process"):
        RunFolder(tmp_path, resume=True)


def test_a_folder_that_holds_a_run_is_refused_and_left_untouched(tmp_path: Path) -> None:
    with RunFolder(tmp_path, resume=False, config_text="a: 1") as run:
        run.metrics_file.write_text("precious")
    with pytest.raises(ConfigError, match=r"--resume, or choose another trainer\.output_dir \(nothing was"):
        RunFolder(tmp_path, resume=False, config_text="a: 2")
    assert run.metrics_file.read_text() == "precious"
    assert (tmp_path / "config.yaml").read_text() == "a: 1"
    RunFolder(tmp_path, resume=True, config_text="a: 1").close()


def test_resuming_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--resume needs a run to go on with"):
        RunFolder(tmp_path / "new", resume=True)


def test_a_folder_with_other_files_is_fine(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder(tmp_path, resume=False).close()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_config_and_starts_are_kept(tmp_path: Path) -> None:
    RunFolder(tmp_path, resume=False, config_text="a: 1").close()
    RunFolder(tmp_path, resume=True, config_text="a: 1").close()
    RunFolder(tmp_path, resume=True, config_text="a: 2").close()
    assert {p.name: p.read_text() for p in tmp_path.glob("config*")} == {
        "config.yaml": "a: 1",
        "config.2.yaml": "a: 2",
    }
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [start["resume"] for start in starts] == [False, True, True]
    assert starts[0]["versions"]["torch"].startswith("2.") and starts[0]["process"] == os.getpid()


def test_other_ranks_know_the_paths_and_write_nothing(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", resume=False, rank=1) as run:
        assert run.checkpoints == tmp_path / "run" / "checkpoints"
    assert not (tmp_path / "run").exists()


def test_commit_is_that_of_tracked_sources_only(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git("init", "-q")
    assert source_commit(package) is None, "the repository around does not hold these sources"
    git("add", ".")
    git("commit", "-q", "-m", "x")
    commit = git("rev-parse", "HEAD")
    assert source_commit(package) == commit
    (package / "__init__.py").write_text("changed = True\n")
    assert source_commit(package) == f"{commit}-dirty"
    assert source_commit(Path(alignlab.__file__).parent.parent / "absent") is None

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import alignlab
from alignlab.errors import CheckpointError, ConfigError, DiskError
from alignlab.files.digests import sealed
from alignlab.runs import lock
from alignlab.runs.folder import RunFolder, output_of_run
from alignlab.runs.provenance import source_commit

HOLD = """
import sys
from pathlib import Path
from alignlab.runs.folder import RunFolder
run = RunFolder(Path(sys.argv[1]), resume=False, config_text="a: 1")
print("ready", flush=True)
sys.stdin.read()
"""

FORK = """
import os, sys
from pathlib import Path
from alignlab.runs.folder import RunFolder
run = RunFolder(Path(sys.argv[1]), resume=False)
if os.fork() == 0:
    print("ready", flush=True)
sys.stdin.read()
"""


C_FORK = """
import ctypes, os, sys, time
from pathlib import Path
from alignlab.runs.folder import RunFolder
run = RunFolder(Path(sys.argv[1]), resume=False)
if ctypes.CDLL(None).fork() == 0:  # Python's hooks do not see it
    os.write(1, b"ready\\n")
    sys.stdin.read()
    os._exit(0)
sys.stdin.read()
"""


HOLD_LOCK = """
import sys
from pathlib import Path
from alignlab.runs.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.read()
"""
HOLD_LOCK_UNNAMED = """
import sys
from pathlib import Path
from alignlab.runs import lock
lock.RunLock._write_name, write = lambda self: None, lock.RunLock._write_name
held = lock.RunLock(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
write(held)
print("named", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("name", ["starts.jsonl", "ends.jsonl"])
def test_a_record_that_was_changed_is_refused(name: str, tmp_path: Path) -> None:
    for resume in (False, True):
        with RunFolder(tmp_path, resume=resume):
            pass
    file = tmp_path / name
    content = file.read_bytes()
    for old, new in ((b'"start": 2', b'"start": 3'), (b'"sha256"', b'"rha256"')):
        assert old in content
        file.write_bytes(content.replace(old, new))
        with pytest.raises(ConfigError, match=rf"line \d of .*{name} must be a record of a run, and is damaged"):
            RunFolder(tmp_path, resume=True)


@pytest.mark.parametrize("name", ["starts.jsonl", "ends.jsonl", "config.yaml", ".lock", "saved.json", "metrics.jsonl"])
def test_a_pipe_a_folder_or_a_broken_link_in_place_of_a_file_is_refused(name: str, tmp_path: Path) -> None:
    with RunFolder(tmp_path, resume=False):
        pass
    file = tmp_path / name
    for make in (file.mkdir, lambda: os.mkfifo(file), lambda: file.symlink_to(file)):
        file.unlink(missing_ok=True)
        make()
        with pytest.raises(ConfigError, match=rf"{name} must be a file, and is a folder, a pipe or a link"):
            RunFolder(tmp_path, resume=True)
        if file.is_dir():
            file.rmdir()


@pytest.mark.parametrize("name", ["identity.json", "labels/rank0.jsonl", "checkpoints/step-00000001/state.json"])
def test_a_pipe_anywhere_in_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    with RunFolder(tmp_path, resume=False):
        pass
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match=rf"{name} must be a file, and is a pipe, whose end may never come"):
        RunFolder(tmp_path, resume=True)


def test_a_folder_that_cannot_be_created_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("mine")
    for name, kind in (("link", "a link that leads to nothing"), ("file", "no folder"), ("file/run", "no folder")):
        with pytest.raises(ConfigError, match=rf"output_dir is .*{name}, and .* is {kind}; choose"):
            RunFolder(tmp_path / name, resume=False)


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


@pytest.mark.parametrize("script", [FORK, C_FORK], ids=["Python", "C"])
def test_a_forked_child_that_outlives_a_killed_run_does_not_keep_the_lock(tmp_path: Path, script: str) -> None:
    process = hold(tmp_path, script)
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


def test_a_folder_with_foreign_files_is_accepted(tmp_path: Path) -> None:
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


def test_a_lock_file_that_was_removed_lets_no_second_run_in(tmp_path: Path) -> None:
    process = hold(tmp_path)
    try:
        (tmp_path / ".lock").unlink()
        with pytest.raises(ConfigError, match=rf"is in use by process {process.pid} on "):
            RunFolder(tmp_path, resume=True)
        with pytest.raises(ConfigError, match="--resume, or choose another"):
            RunFolder(tmp_path, resume=False)
    finally:
        end(process)
    RunFolder(tmp_path, resume=True).close()


def is_locked(folder: Path) -> bool:
    """Whether another process finds the lock taken."""
    script = "import fcntl, sys\nfcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    done = subprocess.run([sys.executable, "-c", script, str(folder / ".lock")], capture_output=True, check=False)
    return b"BlockingIOError" in done.stderr


def test_a_lost_lock_is_taken_again_on_renewal(tmp_path: Path) -> None:
    """Closing any other handle of a file frees a process's record locks on it, as code does that copies the folder."""
    with RunFolder(tmp_path / "run", resume=False) as run:
        assert is_locked(run.path)
        shutil.copytree(run.path, tmp_path / "copy")
        assert not is_locked(run.path)
        run.renew()
        assert is_locked(run.path)
        (run.path / ".lock").unlink()
        run.renew()
        assert is_locked(run.path)
    assert not is_locked(run.path)


def test_a_lock_that_another_process_holds_is_not_taken_on_renewal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_NAMING_S", 0.0)  # the process never writes its name
    run = RunFolder(tmp_path, resume=False)
    (tmp_path / ".lock").unlink()
    script = "import fcntl, sys\nfile = open(sys.argv[1], 'a')\nfcntl.lockf(file, fcntl.LOCK_EX)"
    process = hold(tmp_path / ".lock", f"{script}\nprint('ready', flush=True)\nsys.stdin.read()")
    try:
        with pytest.raises(ConfigError, match="is in use by another process"):
            run.renew()
    finally:
        end(process)
        run.close()


def test_a_lock_that_was_lost_to_another_process_is_not_taken_on_renewal(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run", resume=False)
    shutil.copytree(run.path, tmp_path / "copy")
    process = hold(run.path, HOLD_LOCK)
    try:
        with pytest.raises(ConfigError, match=rf"is in use by process {process.pid} on "):
            run.renew()
    finally:
        end(process)
    run.renew()
    assert (run.path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    run.close()


def test_the_name_that_a_dead_process_left_is_not_told_for_the_one_that_is_about_to_write_its_own(
    tmp_path: Path,
) -> None:
    (tmp_path / ".lock").write_text("process 1 on elsewhere\n")
    process = hold(tmp_path, HOLD_LOCK_UNNAMED)
    assert process.stdin is not None

    def name_yourself(seconds: float) -> None:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert process.stdout.readline() == "named\n"

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lock.time, "sleep", name_yourself)
            with pytest.raises(ConfigError, match=rf"is in use by process {process.pid} on "):
                RunFolder(tmp_path, resume=False)
    finally:
        end(process)


@pytest.mark.parametrize("left", [b"process 1 on elsewhere\n", b"process 4194304 on here\n", b"", b"\0\xff" * 500])
def test_a_lock_file_that_a_dead_process_or_another_machine_left_stops_no_run(left: bytes, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_bytes(left)
    with RunFolder(tmp_path, resume=False):
        assert (tmp_path / ".lock").read_text() == f"{lock.holder()}\n"


def test_a_filesystem_without_locks_is_named_and_not_taken_for_a_second_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    expected = r"run's folder cannot be written to .*: No locks available; the filesystem refuses locks"
    with pytest.raises(DiskError, match=expected):
        RunFolder(tmp_path, resume=False)


def test_a_process_is_known_by_its_start_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = hold(tmp_path)
    try:
        (start,) = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
        assert start["process"] == process.pid
        monkeypatch.setattr("time.time", lambda: 0.0)
        assert lock.is_alive(start)
        boot, _, ticks = start["process_started"].rpartition(" ")
        assert not lock.is_alive(start | {"process_started": f"{boot} {int(ticks) + 1}"})  # the number was given again
        assert not lock.is_alive(start | {"process_started": f"another boot {ticks}"})
        assert not lock.is_alive(start | {"host": "elsewhere"})
    finally:
        end(process)
    assert not lock.is_alive(start)


def test_a_moved_or_replaced_folder_is_refused_on_renewal(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run", resume=False)
    run.renew()
    run.path.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="must stay in its place while it runs"):
        run.renew()
    run.path.mkdir()
    with pytest.raises(ConfigError, match="must stay in its place while it runs"):
        run.renew()
    run.close()


def test_a_run_keeps_its_id_and_another_has_another(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "a", resume=False) as first:
        run_id = first.run_id
    assert run_id is not None and len(run_id) == 32
    with RunFolder(tmp_path / "a", resume=True) as again, RunFolder(tmp_path / "b", resume=False) as other:
        assert again.run_id == run_id != other.run_id
    starts = [json.loads(line) for line in (tmp_path / "a" / "starts.jsonl").read_text().splitlines()]
    assert [(start["run"], start["start"]) for start in starts] == [(run_id, 1), (run_id, 2)]


@pytest.mark.parametrize(
    "made",
    [
        "config.yaml", "config.7.yaml", "metrics.jsonl", "report.json", "checkpoints/step-1/x",
        "adapter/adapter_config.json", "rollouts/step-1.parquet",
    ],
)
def test_results_without_their_starts_are_refused_and_untouched(tmp_path: Path, made: str) -> None:
    (tmp_path / made).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / made).write_text("precious")
    for resume in (False, True):
        with pytest.raises(ConfigError, match=rf"holds {made.split('/')[0]} without the starts\.jsonl"):
            RunFolder(tmp_path, resume=resume, config_text="a: 2")
    assert (tmp_path / made).read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {made.split("/")[0], ".lock"}


def line(record: dict[str, Any]) -> str:
    return json.dumps(sealed(record)) + "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (line({"resume": False}), "names no run: an earlier version"),
        ("", "names 0 runs|names no run"),
        (line({"run": "a"}) + line({"run": "b"}), "names 2 runs"),
        (line({"run": "a"}) + line({"run": "a"})[:-5], "line 2 of .* is damaged"),
        ('{"run": "a"}\n', "line 1 of .* is damaged .it holds no digest of itself"),
    ],
)
def test_starts_that_do_not_name_one_run_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "starts.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=message):
        RunFolder(tmp_path, resume=True)


def test_a_stage_of_another_run_is_refused(tmp_path: Path) -> None:
    RunFolder(tmp_path, resume=False, part_of="a").close()
    RunFolder(tmp_path, resume=True, part_of="a").close()
    with pytest.raises(ConfigError, match="must be a stage of the run b, and is one of a"):
        RunFolder(tmp_path, resume=True, part_of="b")


def test_leftovers_of_a_killed_start_are_removed_on_resume(tmp_path: Path) -> None:
    RunFolder(tmp_path, resume=False).close()
    folders = (".model.tmp", "checkpoints/.step-00000004.tmp", "checkpoints/.step-00000002.removed")
    for name in (*folders, "models/.step-00000002.removed"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "half").write_text("x")
    (tmp_path / "rollouts").mkdir()
    for name in (".metrics.jsonl.tmp", "rollouts/.step-00000004-rank1.parquet.tmp", ".mine"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".adapter.replaced").mkdir()
    (tmp_path / ".adapter.replaced" / "whole").write_text("x")
    RunFolder(tmp_path, resume=True).close()
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {".lock", ".mine", "starts.jsonl", "ends.jsonl", "config.yaml", "adapter/whole"}


def test_how_each_start_ended_is_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with RunFolder(tmp_path, resume=False) as run:
        run.ended("interrupted", 4)
    with pytest.raises(ValueError, match="x"), RunFolder(tmp_path, resume=True) as run:
        run.ended("failed", 5)
        raise ValueError("x")
    ends = [json.loads(line) for line in (tmp_path / "ends.jsonl").read_text().splitlines()]
    assert [(end["start"], end["outcome"], end["step"]) for end in ends] == [(1, "interrupted", 4), (2, "failed", 5)]
    assert ends[1]["error"] == "ValueError: x" and ends[1]["run"] == run.run_id
    assert not caplog.messages
    end(hold(tmp_path, HOLD.replace("resume=False", "resume=True")))
    RunFolder(tmp_path, resume=True).close()
    assert any("did not end by itself when it was last started" in message for message in caplog.messages)


def test_a_run_that_a_signal_ends_outside_its_steps_is_recorded_as_interrupted(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), RunFolder(tmp_path, resume=False):
        raise KeyboardInterrupt("SIGTERM")
    (record,) = [json.loads(line) for line in (tmp_path / "ends.jsonl").read_text().splitlines()]
    assert record["outcome"] == "interrupted" and "error" not in record


def test_a_config_is_never_overwritten(tmp_path: Path) -> None:
    RunFolder(tmp_path, resume=False, config_text="a: 1").close()
    for text in ("a: 2", "a: 3"):
        RunFolder(tmp_path, resume=True, config_text=text).close()
    (tmp_path / "config.2.yaml").unlink()
    RunFolder(tmp_path, resume=True, config_text="a: 4").close()
    assert {p.name: p.read_text() for p in tmp_path.glob("config*")} == {
        "config.yaml": "a: 1", "config.2.yaml": "a: 4", "config.3.yaml": "a: 3",
    }  # fmt: skip


def test_other_ranks_know_the_paths_and_write_nothing(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", resume=False, rank=1) as run:
        assert run.checkpoints == tmp_path / "run" / "checkpoints"
    assert not (tmp_path / "run").exists()


def test_the_commit_is_that_of_tracked_sources_only(tmp_path: Path) -> None:
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
    os.utime(package / "__init__.py", (1, 1))
    index = (tmp_path / ".git" / "index").read_bytes()
    assert source_commit(package) == commit
    assert (tmp_path / ".git" / "index").read_bytes() == index, "nothing is written, so that nothing is locked"
    (package / "__init__.py").write_text("changed = True\n")
    assert source_commit(package) == f"{commit}-dirty"
    assert source_commit(Path(alignlab.__file__).parent.parent / "absent") is None


def test_a_checkpoint_without_a_record_is_recorded_on_resume(tmp_path: Path) -> None:
    with RunFolder(tmp_path, resume=False) as folder:
        folder.saved(2)
    with RunFolder(tmp_path, resume=True) as folder:
        folder.check_newest(3)
    with RunFolder(tmp_path, resume=True) as folder:
        assert folder.saved_step == 3
        folder.check_newest(3)
        with pytest.raises(CheckpointError, match="has saved a checkpoint of step 3"):
            folder.check_newest(None)


@pytest.mark.parametrize(
    ("files", "made"),
    [
        (["adapter/adapter_config.json"], "adapter"),
        (["policy/adapter/adapter_config.json", "revision/model/config.json"], "policy/adapter"),
        (["revision/model/config.json", "report.json"], "revision/model"),
        (["revision/model/config.json"], None),
        (["policy/starts.jsonl", "revision/model/config.json", "report.json"], None),
    ],
)
def test_what_a_run_of_stages_has_made_is_that_of_its_last(files: list[str], made: str | None, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert output_of_run(tmp_path) == (None if made is None else tmp_path / made)

"""How a command ends: its exit status, and the last line of standard output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import alignlab.run_from_config
from alignlab.cli import main, make_parser
from alignlab.cli.ending import ExitStatus, no_silent_exit, print_closing_line
from alignlab.errors import AlignlabError, NumericsError, RankError
from alignlab.scoring.calls import run_in_thread


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {architecture: {hidden_size: 8}, tokenizer: {vocab_size: 300, num_texts: 5}}\n"
        "data: {task: chain_sum, size: 5}\nrewards: [{name: exact_match}]\n"
        f"trainer: {{type: grpo, num_steps: 1, output_dir: {tmp_path / 'run'}}}\n"
    )
    return path


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (NumericsError("nan"), 2, "alignlab train: nan"),
        (RankError("rank 1 failed"), 2, "alignlab train: rank 1 failed"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (KeyboardInterrupt(), 130, "alignlab train: interrupted"),
        (SystemExit(0), 1, "asked to end the process: 0; the run is not over"),
        (SystemExit(), 1, "asked to end the process: None; the run is not over"),
    ],
)
def test_a_run_that_is_not_over_never_ends_with_status_0(
    error: BaseException, status: int, message: str, run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def failing(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(alignlab.run_from_config, "run", failing)
    assert main(["train", str(run_file)]) == status
    out, err = capsys.readouterr()
    assert out == "" and message in err


def test_every_named_error_has_status_2(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [kind for kind in AlignlabError.__subclasses__() if kind.__init__ is Exception.__init__]
    for kind in kinds:
        def failing(*args: Any, kind: type[AlignlabError] = kind, **options: Any) -> None:
            raise kind("x")

        monkeypatch.setattr(alignlab.run_from_config, "run", failing)
        assert main(["train", str(run_file)]) == ExitStatus.ERROR, kind


def test_an_error_without_a_name_is_raised(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python tells it with its traceback, and ends with status 1."""
    def failing(*args: Any, **options: Any) -> None:
        raise ZeroDivisionError("x")

    monkeypatch.setattr(alignlab.run_from_config, "run", failing)
    with pytest.raises(ZeroDivisionError):
        main(["train", str(run_file)])


def test_the_help_says_the_statuses() -> None:
    commands: Any = make_parser()._subparsers
    (group,) = commands._group_actions
    told = group.choices["train"].format_help()
    assert all(f"{status}" in told for status in (0, 1, 2, 130))


def test_the_closing_line_is_a_line_of_its_own(tmp_path: Path) -> None:
    """Whatever was written before, by whomever, to a pipe or a file."""
    script = (
        "import os, sys\nfrom alignlab.cli.ending import print_closing_line\n"
        "print(sys.argv[1], end='')\nsys.stdout.flush()\nos.write(1, sys.argv[2].encode())\n"
        "print_closing_line({'learnt': True})\n"
    )
    for words in (["", ""], ["loss", ""], ["", "of a child"], ["a\n", "b\n"]):
        command = [sys.executable, "-c", script, *words]
        piped = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        file = tmp_path / "out"
        with file.open("w") as out:
            subprocess.run(command, stdout=out, check=True)
        for text in (piped, file.read_text()):
            assert json.loads(text.splitlines()[-1]) == {"learnt": True}
    assert file.read_text() == 'a\nb\n{"learnt": true}\n', "no empty line where it is known that none is needed"


def test_the_closing_line_is_of_the_first_rank(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("RANK", "1")
    print_closing_line({"learnt": True})
    assert capsys.readouterr().out == ""


def test_code_that_a_run_calls_cannot_end_it_as_if_all_were_well() -> None:
    real = os._exit
    with pytest.raises(SystemExit, match=r"os\._exit\(0\)"), no_silent_exit():
        os._exit(0)
    assert os._exit is real


def test_a_reward_that_asks_to_exit_is_a_failed_reward() -> None:
    with no_silent_exit():
        future = run_in_thread(lambda: os._exit(0))
        assert isinstance(future.exception(timeout=60), SystemExit)


@pytest.mark.parametrize(
    ("work", "status", "message"),
    [
        ("thread = threading.Thread(target=os._exit, args=(0,))\n    thread.start(); thread.join()", 1, "ends the run"),
        ("thread = threading.Thread(target=os._exit, args=(7,))\n    thread.start(); thread.join()", 7, "ends the run"),
        ("child = os.fork() or os._exit(0)\n    print(os.waitpid(child, 0)[1])", 0, ""),
    ],
)
def test_other_threads_end_the_process_and_children_end_themselves(work: str, status: int, message: str) -> None:
    imports = "import os, threading\nfrom alignlab.cli.ending import no_silent_exit"
    script = f"{imports}\nwith no_silent_exit():\n    {work}\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == status and message in done.stderr

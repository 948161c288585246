"""The end of a command whose code has left threads behind."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from alignlab.cli.process_end import end_despite_threads

def slow_call(): {call}

print("the result", flush=True)
pool = ThreadPoolExecutor(1)
pool.submit(slow_call)
sys.exit(end_despite_threads({status}, 0.3))
"""


def run(call: str, status: int) -> subprocess.CompletedProcess[str]:
    code = SCRIPT.format(call=call, status=status)
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("status", [0, 2])
def test_a_thread_that_hangs_does_not_keep_the_process(status: int) -> None:
    done = run("threading.Event().wait()", status)
    assert (done.returncode, done.stdout) == (status, "the result\n")
    assert "after 0.3 s threads of code that it called still run: 'ThreadPoolExecutor-0_0' at <string>:6" in done.stderr
    assert "(slow_call); the process is ended without them" in done.stderr


def test_threads_that_end_are_waited_for() -> None:
    done = run("print('also this', flush=True)", 2)
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout == "the result\nalso this\n"

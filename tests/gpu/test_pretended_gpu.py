"""Starts the tests on a pretended GPU, `on_gpu_*.py`, in a process of their own: its shim is loaded before torch.

`python -m pytest tests/gpu --full` runs every trainer with every kind of model in every precision, not a part of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.plugin import compiler

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler, for tests/gpu/device_guard.cpp"),
]


@pytest.mark.timeout(0)
def test_tests_on_a_pretended_gpu_pass(request: pytest.FixtureRequest) -> None:
    """All but those of trainers in 16 bits, which `test_pretended_gpu_16_bits` starts beside these."""
    is_full = request.config.getoption("full")
    paths = sorted(HERE.glob("on_gpu_*.py"))
    done = on_a_pretended_gpu(*paths, chosen="not (on_gpu_trainers and float16)", is_full=is_full)
    assert done.returncode == 0, (done.stdout + done.stderr)[-12000:]


def on_a_pretended_gpu(*paths: Path, chosen: str, is_full: bool) -> subprocess.CompletedProcess[str]:
    """Run the tests of some files that an expression chooses, in a process of their own, and return its end."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.gpu.plugin", "-q", "--no-header", "-k", chosen]
    command += [*map(str, paths), *(["--full"] if is_full else [])]
    environment = os.environ | {"ALIGNLAB_PRETENDED_GPU": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
        environment.pop(name, None)
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        timeout=4000 if is_full else 950,
    )

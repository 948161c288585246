"""Starts the tests on a pretended GPU, `on_gpu_*.py`, in a process of their own: its shim is loaded before torch."""

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


@pytest.mark.timeout(1000)
def test_tests_on_a_pretended_gpu_pass() -> None:
    """All but those of trainers in 16 bits, which `test_pretended_gpu_16_bits` starts beside these."""
    done = on_a_pretended_gpu(*sorted(HERE.glob("on_gpu_*.py")), chosen="not (on_gpu_trainers and float16)")
    assert done.returncode == 0, (done.stdout + done.stderr)[-12000:]


def on_a_pretended_gpu(*paths: Path, chosen: str) -> subprocess.CompletedProcess[str]:
    """Run the tests of some files that an expression chooses, in a process of their own, and return its end."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.gpu.plugin", "-q", "--no-header", "-k", chosen]
    command += map(str, paths)
    environment = os.environ | {"ALIGNLAB_PRETENDED_GPU": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
        environment.pop(name, None)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=950, check=False)

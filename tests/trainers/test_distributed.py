"""Two processes compute the gradient that one does, and train in step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.trainers.rank_gradients import gradients

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.distributed


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Two ranks on this machine."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)


def test_gradient_does_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    done = torchrun(str(ROOT / "tests/trainers/rank_gradients.py"), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-3000:]
    alone, metrics = gradients(0, 1, tmp_path)
    for rank in (0, 1):
        path = tmp_path / f"rank{rank}.safetensors"
        shared = load_file(path)
        assert shared.keys() == alone.keys()
        for name, gradient in alone.items():
            torch.testing.assert_close(shared[name], gradient, rtol=2e-4, atol=2e-6, msg=name)
        with safe_open(path, "pt") as file:
            assert float(file.metadata()["loss"]) == pytest.approx(metrics["loss"], rel=1e-4)

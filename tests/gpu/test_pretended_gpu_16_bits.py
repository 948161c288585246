"""Starts the trainers in 16 bits on a pretended GPU: by another process of the tests than the others."""

from __future__ import annotations

import pytest

from tests.gpu.test_pretended_gpu import HERE, on_a_pretended_gpu, pytestmark

__all__ = ["pytestmark"]


@pytest.mark.timeout(0)
def test_trainers_in_16_bits_on_a_pretended_gpu_pass(request: pytest.FixtureRequest) -> None:
    is_full = request.config.getoption("full")
    done = on_a_pretended_gpu(HERE / "on_gpu_trainers.py", chosen="float16", is_full=is_full)
    assert done.returncode == 0, (done.stdout + done.stderr)[-12000:]

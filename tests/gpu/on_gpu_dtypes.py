"""What CUDA refuses and leaves open in a deterministic run, and what a mixture is told by its dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.gpu.on_gpu_trainers import Kind, deterministic, make, teacher

__all__ = ["deterministic", "make", "teacher"]


@pytest.mark.usefixtures("deterministic")
def test_what_cuda_refuses_and_what_it_adds_in_any_order_is_found(gpu: Callable[..., Any]) -> None:
    with gpu() as mode:
        values, places = torch.ones(4, device="cuda"), torch.tensor([0, 1, 1, 2], device="cuda")
        torch.zeros(3, device="cuda").index_add(0, places, values)
        assert len(mode.unordered) == 1
        mode.unordered.clear()
        torch.zeros(4, device="cuda").scatter_add(0, places.unique(), values[:3])
        torch.zeros(3, device="cuda", dtype=torch.int64).index_add(0, places, places)
        assert mode.unordered == set()
        values.cumsum(0)
        torch.use_deterministic_algorithms(True)
        places.cumsum(0)
        with pytest.raises(RuntimeError, match="cumsum does not have a deterministic implementation"):
            values.cumsum(0)


def test_a_mixture_in_float32_on_a_gpu_is_told_that_it_has_no_grouped_kernel(
    make: Callable[..., Any], gpu: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with gpu():
        make(Kind("sft", False, True, torch.bfloat16), "bfloat16")
        assert "grouped kernel" not in caplog.text
        make(Kind("sft", False, True, torch.float16), "float16")
        assert "a mixture of experts in float16, for which torch has no grouped kernel" in caplog.text

"""Every trainer takes a deterministic step on a pretended GPU in 16 bits: dense and mixture, adapter and all weights.

An operation for which CUDA has no deterministic form raises; one that adds floats in an open order is listed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from alignlab.loop.numerics import VLLM_PRECISION, WORKSPACE
from tests.gpu.on_gpu_trainers import NEED_LORA, Kind, make, name_of
from tests.trainers.tiny import CASES

__all__ = ["make"]
KINDS = [
    Kind(name, lora, mixture, torch.bfloat16)
    for name in CASES for lora in (True, False) for mixture in (True, False) if lora or name not in NEED_LORA
]
KINDS += [
    Kind(name, lora, mixture, torch.float16)
    for name, lora in (("sft", False), ("dpo", False), ("grpo", False), ("grpo", True)) for mixture in (True, False)
]
SHORT = {"num_prompts": 2, "group_size": 2, "sampling": {"max_new_tokens": 2}}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Settings that a deterministic run makes for its process."""
    for name in (WORKSPACE, VLLM_PRECISION):
        monkeypatch.setenv(name, ":4096:8" if name == WORKSPACE else "highest")
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_a_step_in_16_bits_is_finite_and_has_one_order_of_sums(
    kind: Kind, make: Callable[..., Any], gpu: Callable[..., Any]
) -> None:
    with gpu() as mode:
        short = {name: SHORT[name] for name in CASES[kind.name].settings if name in SHORT}
        trainer = make(kind, "gpu", numerics={"deterministic": True}, **short)
        assert torch.are_deterministic_algorithms_enabled()
        weights = trainer.learner.trained
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        metrics = trainer.train_step(1)
        assert all(math.isfinite(value) for value in metrics.values()), metrics
        assert any(bool((weight != before[name]).any()) for name, weight in weights.items())
        assert {weight.dtype for weight in weights.values()} <= {torch.float32, kind.dtype}
        assert mode.unordered == set()


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

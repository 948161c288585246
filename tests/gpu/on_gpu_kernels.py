"""Layouts and dtypes that reach the GPU's kernels: those on which CUDA's kernels assert nothing and lose no speed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.config.model import LoraSettings
from alignlab.config.rollout import RolloutSettings
from alignlab.models import flex_attention
from alignlab.models.adapters import add_lora
from alignlab.models.policy import Policy
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.types import Prompt, SamplingParams
from tests.gpu.flex_stand_in import dense_flex
from tests.gpu.on_gpu_waits import MIXTURE, make_model, make_pack
from tests.trainers.conftest import DENSE

GROUPED = torch.ops.aten._grouped_mm.default


def order_of(tensor: Tensor) -> str:
    """The order of the last two dimensions in memory, whose rows a kernel reads by 16 bytes."""
    strides = tensor.stride()[-2:]
    for order, unit, other in (("row", strides[1], strides[0]), ("column", strides[0], strides[1])):
        if unit == 1 and other * tensor.element_size() % 16 == 0:
            return order
    return f"neither: {tuple(tensor.shape)}, strides {tensor.stride()}"


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2, experts=True)], ids=["all weights", "adapters of experts"])
def test_grouped_products_have_the_layouts_that_cutlass_takes_with_empty_groups(
    lora: LoraSettings | None, gpu: Callable[..., Any], tokenizer: Any
) -> None:
    """GroupMMCommon.cuh: of two matrices, as in a weight's gradient, the first must be column-major, the second
    row-major, or a group without rows ends the process by a device-side assert."""
    num_products = {"forward": 0, "gradient of weights": 0}

    def check(func: Any, tensors: list[Tensor], place: str) -> None:
        if func is not GROUPED:
            return
        first, second = tensors[:2]
        orders = order_of(first), order_of(second)
        assert set(orders) <= {"row", "column"}, (orders, place)
        assert first.dtype == second.dtype == torch.bfloat16, place
        if first.dim() == second.dim() == 2:
            assert orders == ("column", "row"), place
        num_products["gradient of weights" if first.dim() == second.dim() == 2 else "forward"] += 1

    with gpu() as mode:
        model = make_model(tokenizer, MIXTURE).bfloat16()
        policy = Policy(model if lora is None else add_lora(model, lora)).to("cuda:0").train()
        pack = make_pack().to("cuda:0")
        mode.watch = check
        policy(pack.tokens, pack.segments, pack.completion_mask).logprobs.sum().backward()
    assert all(num_products.values()), num_products


@pytest.mark.parametrize("architecture", [DENSE, DENSE | {"use_qk_norm": True}], ids=["plain", "normed keys"])
def test_queries_keys_and_values_have_one_dtype_under_autocast_too(
    architecture: dict[str, Any], gpu: Callable[..., Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes: list[set[torch.dtype]] = []

    def record(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        dtypes.append({query.dtype, key.dtype, value.dtype})
        return dense_flex(query, key, value, **options)

    with gpu():
        monkeypatch.setattr(flex_attention, "_compiled_flex", lambda *_: record)
        policy = Policy(make_model(tokenizer, architecture).bfloat16()).to("cuda:0")
        pack = make_pack().to("cuda:0")
        for autocast in (False, True):
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                policy(pack.tokens, pack.segments, pack.completion_mask)
    assert dtypes == [{torch.bfloat16}] * len(dtypes) and len(dtypes) == 4


def test_sampling_has_no_float64_over_the_vocabulary(gpu: Callable[..., Any], tokenizer: Any) -> None:
    vocabulary = len(tokenizer)
    wide: set[str] = set()

    def check(func: Any, tensors: list[Tensor], place: str) -> None:
        wide.update(
            place for tensor in tensors if tensor.dtype == torch.float64 and tensor.shape[-1:] == (vocabulary,)
        )

    with gpu() as mode:
        engine = EmbeddedEngine(make_model(tokenizer, MIXTURE).to("cuda:0"), tokenizer, RolloutSettings())
        mode.watch = check
        truncation = {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}
        engine.generate([Prompt((1, 2, 3), "")], SamplingParams(n=2, max_new_tokens=3, seed=1, **truncation))
    assert not wide

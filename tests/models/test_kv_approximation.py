"""Approximations of keys and values: by hand, and replayed against a slow twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alignlab.models.kv_approximation.rounding import Rounding, to_float8, to_int8
from alignlab.models.kv_approximation.straight_through import straight_through
from tests.models.conftest import make_segments
from tests.reference.attention import dense_attention

GROUPS = [(5, [3, 7]), (6, []), (9, [4])]
OPTIONS = {"scaling": 0.4, "sliding_window": 4, "softcap": 1.5, "sinks": None}


def inputs(num_tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, n, num_tokens, 8, generator=generator).to(dtype).requires_grad_() for n in (4, 2, 2)]


def test_int8_by_hand() -> None:
    codes, scales = to_int8(torch.tensor([[1.27, -0.636, 0.634, 0.0], [0.0, 0.0, 0.0, 0.0], [-254.0, 1.0, 3.0, 127.0]]))
    assert codes.dtype == torch.int8
    assert codes.tolist() == [[127, -64, 63, 0], [0, 0, 0, 0], [-127, 0, 2, 64]]  # 63.5 rounds to the even 64
    torch.testing.assert_close(scales, torch.tensor([0.01, torch.finfo(torch.float32).tiny, 2.0]))
    decoded = Rounding("int8").rounded(torch.tensor([[1.27, -0.636, 0.634, 0.0]]))
    torch.testing.assert_close(decoded, torch.tensor([[1.27, -0.64, 0.63, 0.0]]))


def test_float8_by_hand() -> None:
    """With a largest number of 448 the scale is 1. Numbers have 4 significant bits: 17 lies between 16 and 18, 19
    between 18 and 20, and the even one is taken; the smallest is 2^-9."""
    x = torch.tensor([448.0, 17.0, 100.5, -0.001, 19.0])
    codes, scales = to_float8(x)
    assert codes.dtype == torch.uint8 and scales == 1
    assert Rounding("fp8").rounded(x).tolist() == [448.0, 16.0, 104.0, -(2**-9), 20.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "bound"), [("int8", 0.5 / 127), ("fp8", 1 / 28)])
def test_the_error_of_rounding_is_bounded_in_every_dtype(bits: str, bound: float, dtype: torch.dtype) -> None:
    x = (torch.randn(50, 3, 16, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    error = (Rounding(bits).rounded(x).float() - x.float()).abs().amax(-1) / x.float().abs().amax(-1)
    assert error.max() <= bound + 2 * torch.finfo(dtype).eps
    assert error.max() > bound / 4


def test_gradients_go_straight_through_and_the_value_is_not_rounded_again() -> None:
    x, approximation = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([0.1, 1e8 + 8])
    result = straight_through(x, approximation)
    assert torch.equal(result, approximation)
    (result * torch.tensor([3.0, -5.0])).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [3.0, -5.0]


@pytest.mark.parametrize("bits", ["int8", "fp8"])
def test_replayed_rounding_is_attention_to_rounded_keys_and_values(bits: str) -> None:
    """Forward and gradients, against the dense twin at the rounded numbers."""
    segments, rounding = make_segments(GROUPS), Rounding(bits)
    query, key, value = inputs(segments.num_tokens)
    output = rounding.attend(query, key, value, segments, **OPTIONS)
    rounded = [query.detach().requires_grad_(), *(rounding.rounded(x.detach()).requires_grad_() for x in (key, value))]
    expected = dense_attention(*rounded, segments, **OPTIONS)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=0)
    assert (output - dense_attention(query, key, value, segments, **OPTIONS)).abs().max() > 1e-3
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for ours, theirs in zip((query, key, value), rounded, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=0)

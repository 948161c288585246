"""Rounded weights by hand, against a slow twin, and against the library whose checkpoints have them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from alignlab.models.weight_rounding import from_codes, rounded_weight, row_codes, to_codes, weight_scales


def test_codes_and_scales_by_hand() -> None:
    weight = torch.tensor([[-7.5, 3.0, 0.5, 1.4], [0.0, 0.0, 0.0, 0.0], [15.0, -1.0, -15.0, 3.0]])
    scales = weight_scales(weight, 4)
    assert scales[:, 0].tolist() == [1.0, torch.finfo(torch.float32).eps, 2.0]
    codes = to_codes(weight, scales, 4)
    # -7.5 and 0.5 lie between two codes, of which the even one is taken; of 15 / 2 = 7.5 the code 8 is missing.
    assert codes.tolist() == [[-8, 3, 0, 1], [0, 0, 0, 0], [7, 0, -8, 2]]
    assert from_codes(codes, scales)[2].tolist() == [14.0, 0.0, -16.0, 4.0]
    assert weight_scales(torch.tensor([[127.5, -2.0]]), 8).item() == 1.0
    assert rounded_weight(torch.tensor([[-127.5, 2.6]]), 8).tolist() == [[-128.0, 3.0]]


def test_groups_have_scales_of_their_own() -> None:
    weight = torch.tensor([[7.5, 1.0, 0.75, 0.3]])
    scales = weight_scales(weight, 4, 2)
    torch.testing.assert_close(scales, torch.tensor([[1.0, 0.1]]))
    assert to_codes(weight, scales, 4).tolist() == [[7, 1, 7, 3]]
    with pytest.raises(ValueError, match="a group has 3 inputs, and must divide the weight's 4"):
        weight_scales(weight, 4, 3)


def slow_rounded(row: list[float], bits: int) -> list[float]:
    scale = max(abs(x) for x in row) / ((2**bits - 1) / 2)
    return [min(max(round(x / scale), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1) * scale for x in row]


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 8), (4, 16), (8, 4)])
def test_rounded_weights_are_those_of_a_slow_twin(bits: int, group: int | None) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(5, 16, dtype=torch.float64)
    rows = weight.view(-1, group or 16).tolist()
    expected = torch.tensor([slow_rounded(row, bits) for row in rows], dtype=torch.float64).view(5, 16)
    torch.testing.assert_close(rounded_weight(weight, bits, group), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_have_codes_within_half_a_step(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    rows = torch.randn(6, 40).to(dtype)
    rows[2] = 0
    codes, scales = row_codes(rows)
    assert codes.abs().amax(-1).tolist() == [127, 127, 0, 127, 127, 127]
    assert ((codes * scales - rows.float()).abs() <= scales * 0.5001).all()
    first = rows[0].float()
    assert int(codes[0, 7]) == round(float(first[7]) / (float(first.abs().max()) / 127))


def library_rounded(weight: Tensor, bits: int, group: int | None) -> Tensor:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    utils = pytest.importorskip("compressed_tensors.quantization.utils")
    args = quantization.QuantizationArgs(
        num_bits=bits, type="int", strategy="channel" if group is None else "group", group_size=group, symmetric=True
    )
    groups = weight.unflatten(1, (-1, group or weight.shape[1]))
    scales, zeros = utils.calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    rounded: Tensor = quantization.fake_quantize(weight, scales, zeros, args)
    return rounded


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32)])
def test_rounding_is_that_of_compressed_tensors(bits: int, group: int | None) -> None:
    torch.manual_seed(2)
    weight = torch.randn(7, 64) * math.pi
    weight[3] = 0
    assert torch.equal(rounded_weight(weight, bits, group), library_rounded(weight, bits, group))

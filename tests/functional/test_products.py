"""Products in float32 where a processor multiplies bfloat16 slower: in blocks, rounded once, of many rows alone."""

from __future__ import annotations

import pytest
import torch

from alignlab.functional import products
from alignlab.functional.logprobs import chunked_logprobs


@pytest.fixture(params=[True, False], ids=["fast-bfloat16", "slow-bfloat16"])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(products, "has_fast_bfloat16", lambda: request.param)
    monkeypatch.setattr(products, "LEAST_ROWS", 5)
    monkeypatch.setattr(products, "BLOCK_NUMBERS", 24)  # 3 outputs of 8 inputs
    return request.param


def test_many_rows_of_bfloat16_are_multiplied_in_what_is_faster(fast: bool) -> None:
    def dtype(rows: int, given: torch.dtype, device: str = "cpu") -> torch.dtype:
        return products.product_dtype(torch.zeros(rows, 2, dtype=given, device=device))

    assert dtype(5, torch.bfloat16) == (torch.bfloat16 if fast else torch.float32)
    assert dtype(4, torch.bfloat16) == dtype(5, torch.bfloat16, "meta") == torch.bfloat16
    assert [dtype(5, each) for each in (torch.float64, torch.float32, torch.float16)] == [
        torch.float64, torch.float32, torch.float16,
    ]  # fmt: skip


@pytest.mark.parametrize("rows", [4, 5, 9])
@pytest.mark.parametrize("outputs", [1, 3, 7])
def test_products_are_the_exact_ones_rounded_once(fast: bool, rows: int, outputs: int) -> None:
    torch.manual_seed(outputs)
    x, grad, weight = (torch.randint(-40, 40, size).bfloat16() for size in ((rows, 8), (rows, outputs), (outputs, 8)))
    exact = x.double() @ weight.double().T, grad.double() @ weight.double()  # integers: no sum is rounded in float32
    found = products.by_inputs(x, weight), products.by_outputs(grad, weight)
    for result, expected in zip(found, exact, strict=True):
        assert result.dtype == torch.bfloat16
        assert torch.equal(result, expected.bfloat16())


def test_log_probs_and_gradients_are_those_of_either(fast: bool) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(11, 8).bfloat16().requires_grad_(), torch.randn(29, 8).bfloat16().requires_grad_()
    exact = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    targets = torch.randint(29, (11,))
    for pair in ((hidden, head), exact):
        logprobs, _ = chunked_logprobs(*pair, targets, chunk_tokens=6)
        (logprobs * torch.arange(1.0, 12.0)).sum().backward()
    for given, twin in zip((hidden, head), exact, strict=True):
        assert given.grad is not None and twin.grad is not None
        assert (given.grad.double() - twin.grad).norm() < 0.01 * twin.grad.norm()

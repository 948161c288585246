"""The C interface: packed products, tokens drawn, and arguments that are refused before a kernel reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.models.cache_spec import LayerCacheSpec
from alignlab.native import build
from alignlab.rollout.embedded.native.binding import Kernels, StepStruct, address, kernels_of
from alignlab.rollout.embedded.native.packing import Packer
from alignlab.rollout.embedded.native.sampling import NativeSampling
from alignlab.rollout.embedded.native.slabs import Slabs
from alignlab.rollout.embedded.native.step_memory import StepPlaces, check_places
from alignlab.rollout.embedded.paged_cache import PagedCache
from alignlab.rollout.embedded.sampling import SamplingTable, sample
from alignlab.types import SamplingParams
from tests.rollout.embedded.native.conftest import needs_bfloat16, needs_kernels

pytestmark = needs_kernels
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 4, 12, 13, 97])
@pytest.mark.parametrize("sizes", [(32, 16), (100, 38), (31, 2)])
def test_packed_products_are_those_of_torch(sizes: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    kernels = kernels_of(dtype)
    torch.manual_seed(rows)
    first, second, x = (torch.randn(n, sizes[1]).to(dtype) for n in (*sizes[:1], 5, rows))
    bias = torch.randn(sizes[0]), torch.randn(5)
    packed = Packer(kernels, lambda module: module).stacked([first, second], bias)
    expected = x.double() @ torch.cat([first, second]).double().T + torch.cat(bias).double()
    torch.testing.assert_close(kernels.product(x, packed).double(), expected, atol=3e-5, rtol=0)


@needs_bfloat16
@pytest.mark.parametrize("fast_pairs", [True, False])
def test_both_kinds_of_products_of_bfloat16_are_right_whatever_the_rows_beside(
    fast_pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "has_fast_pairs", lambda: fast_pairs)
    kernels = Kernels(torch.bfloat16)  # one of the two is compiled for this test alone
    torch.manual_seed(0)
    weight, x = (torch.randint(-40, 40, size).bfloat16() for size in ((70, 38), (100, 38)))
    packed = Packer(kernels, lambda module: module).stacked([weight])
    exact = (x.double() @ weight.double().T).float()  # of integers: no sum is rounded
    for rows in (1, 2, 3, 4, 7, 12, 13, 96, 100):
        assert torch.equal(kernels.product(x[-rows:].contiguous(), packed), exact[-rows:])
    weight, x = torch.randn(70, 38).bfloat16(), torch.randn(100, 38).bfloat16()
    packed = Packer(kernels, lambda module: module).stacked([weight])
    together = kernels.product(x, packed)
    for rows in (1, 2, 5, 13):
        assert torch.equal(kernels.product(x[-rows:].contiguous(), packed), together[-rows:])


@pytest.mark.parametrize("vocab_size", [17, 256, 700])
def test_tokens_are_drawn_as_the_sampler_draws_them(vocab_size: int) -> None:
    torch.manual_seed(vocab_size)
    temperatures = [1.0, 0.0, 0.3, 1.7]
    rows = [SamplingParams(temperature=temperatures[i % 4]) for i in range(200)]
    keys = torch.randint(-(2**62), 2**62, (200,)).tolist()
    table = SamplingTable.build(rows, keys, vocab_size=vocab_size, device=CPU)
    logits, positions = 2 * torch.randn(200, vocab_size), torch.randint(0, 50, (200,))
    logits[3, 5], logits[1, -1] = -torch.inf, logits[1].max()  # the first of two highest logits is taken
    drawn = NativeSampling(kernels_of(torch.float32))(logits, table, positions)
    expected = sample(logits, table, positions)
    assert torch.equal(drawn.tokens, expected.tokens)
    assert len(set(drawn.tokens.tolist())) > 10
    torch.testing.assert_close(drawn.logprobs, expected.logprobs, atol=3e-6, rtol=0)
    torch.testing.assert_close(drawn.raw_logprobs, expected.raw_logprobs, atol=3e-6, rtol=0)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_have_no_logprob(wrong: float) -> None:
    logits = torch.zeros(3, 40)
    logits[1, 33] = wrong
    table = SamplingTable.build([SamplingParams()] * 3, [1, 2, 3], vocab_size=40, device=CPU)
    drawn = NativeSampling(kernels_of(torch.float32))(logits, table, torch.zeros(3, dtype=torch.int64))
    assert drawn.raw_logprobs.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("params", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}])
def test_truncated_rows_are_left_to_the_sampler(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = kernels_of(torch.float32)
    monkeypatch.setattr(kernels, "draw", lambda *_: pytest.fail("the kernels do not truncate"))
    table = SamplingTable.build([SamplingParams(**params)], [1], vocab_size=40, device=CPU)
    NativeSampling(kernels)(torch.randn(1, 40), table, torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("tensor", "shape", "problem"),
    [
        (torch.zeros(2, 3), (2, 4), r"shape \(2, 4\).*was given torch.float32 of shape \(2, 3\)"),
        (torch.zeros(6), (2, 3), "shape"), (torch.zeros(2, 3).T, (3, 2), "contiguous"),
        (torch.zeros(2, 3, dtype=torch.float64), (2, 3), "torch.float64"),
        (torch.zeros(2, 3, device="meta"), (2, 3), "on meta"),
    ],
)  # fmt: skip
def test_a_tensor_of_another_form_is_refused(tensor: Tensor, shape: tuple[int, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        address(tensor, shape, torch.float32)
    with pytest.raises(ValueError, match=problem):
        StepStruct().hold(residual=(tensor, shape, torch.float32))


def test_arguments_that_do_not_fit_each_other_are_refused() -> None:
    kernels = kernels_of(torch.float32)
    packed = Packer(kernels, lambda module: module).stacked([torch.randn(40, 6)])
    with pytest.raises(ValueError, match="rows have 5 numbers, and the weight reads 6 words"):
        kernels.product(torch.randn(2, 5), packed)
    panels = torch.zeros(2, 6, 32, dtype=torch.int32)
    with pytest.raises(ValueError, match="do not fit 2 panels"):
        kernels.pack(torch.randn(40, 6), panels, first=25, per_panel=32, lane=0)
    with pytest.raises(ValueError, match=r"shape \(-1, 7, 32\)"):
        kernels.pack(torch.randn(40, 7), panels, first=0, per_panel=32, lane=0)
    for wrong in (torch.zeros(3), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="native kernel reads"):
            kernels.draw(torch.zeros(2, 9), torch.zeros(2).long(), torch.zeros(2).long(), wrong)


def test_tokens_and_blocks_that_are_not_there_are_refused() -> None:
    cache = PagedCache({0: LayerCacheSpec.of_heads(1, 2, 2, window=3), 1: LayerCacheSpec.of_heads(1, 2, 2)}, 4)
    cache.resize({3: 2, None: 5})
    one = torch.zeros(1, dtype=torch.int64)

    def places(token: int, *blocks: int) -> StepPlaces:
        return StepPlaces(one + token, one, one, torch.tensor([0, 1]), torch.tensor(blocks).view(2, 1, 1), one)

    check_places(places(9, 1, 4), cache, 10)
    for wrong, problem in (
        (places(10, 1, 4), "tokens are 10 to 10, and the model has 10"), (places(-1, 1, 4), "tokens are -1"),
        (places(9, 2, 4), "window 3 has 2"), (places(9, 1, 5), "window None has 5"),
        (places(9, -1, 4), "blocks are -1"),
    ):
        with pytest.raises(ValueError, match=problem):
            check_places(wrong, cache, 10)


def test_a_structure_keeps_its_tensors_and_slabs_hand_out_zeros_apart() -> None:
    struct = StepStruct()
    struct.hold(tokens=(torch.arange(5), (5,), torch.int64), num_tokens=5)
    held = struct.__dict__["held"]["tokens"]
    assert struct.tokens == held.data_ptr() and held.tolist() == [0, 1, 2, 3, 4] and struct.num_tokens == 5
    slabs = Slabs()
    tensors = [slabs.zeros(3, 5), slabs.zeros(17), slabs.zeros(2**24 + 1)]
    for number, tensor in enumerate(tensors, start=1):
        assert tensor.data_ptr() % 64 == 0 and not tensor[:3].any()
        tensor.fill_(number)
    assert [int(tensor.max()) for tensor in tensors] == [int(tensor.min()) for tensor in tensors] == [1, 2, 3]

"""Digests of weights find every change; word sums are the same on every device and from parts of a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from alignlab.models import sync_digests as module
from alignlab.models.sync_digests import (
    ALGORITHMS,
    WORD_SUMS,
    XXH3,
    PendingDigests,
    algorithm_on,
    content_sums,
    digest_of_sums,
    sync_digests,
)

ROW = 4096
MASK = 2**64 - 1
KINDS = [
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool,
    torch.float8_e4m3fn,
]  # fmt: skip
SIZES = [(), (0, 3), (1,), (3,), (ROW,), (ROW - 1,), (3, ROW + 5), (2, 19 * ROW)]


def mixed(number: int) -> int:
    """SplitMix64 whose shifts keep the sign, made odd."""

    def shifted(bits: int, count: int) -> int:
        return (bits - 2**64 if bits >> 63 else bits) >> count & MASK

    bits = (number + 1) * 0x9E3779B97F4A7C15 & MASK
    bits = (bits ^ shifted(bits, 30)) * 0xBF58476D1CE4E5B9 & MASK
    bits = (bits ^ shifted(bits, 27)) * 0x94D049BB133111EB & MASK
    return bits ^ shifted(bits, 31) | 1


def slow_sums(tensor: Tensor) -> list[int]:
    """The formula of the module's docstring, word by word, in integers without a limit."""
    content = bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
    words = [int.from_bytes(content[at : at + 4], "little", signed=True) for at in range(0, len(content) // 4 * 4, 4)]
    rest = content[len(words) * 4 :]
    if rest:
        words.append(int.from_bytes(rest.ljust(4, b"\0"), "little", signed=True))
    first = sum(word * (2 * i + 1) for i, word in enumerate(words))
    columns = [mixed(-1 - column) for column in range(min(ROW, len(words)))]
    second = sum(word * columns[i % ROW] * mixed(i // ROW) for i, word in enumerate(words))
    return [first & MASK, second & MASK]


def sums_of(tensor: Tensor, offset: int = 0) -> list[int]:
    return [value & MASK for value in content_sums(tensor, offset=offset).tolist()]


def digest(tensor: Tensor, algorithm: str = WORD_SUMS) -> str:
    return sync_digests({"x": tensor}, algorithm=algorithm)["x"]


def random_tensor(shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    num_bytes = math.prod(shape) * dtype.itemsize
    content = torch.randint(0, 2 if dtype == torch.bool else 256, (num_bytes,), generator=generator, dtype=torch.uint8)
    return content.view(dtype).view(shape)


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_sums_are_those_of_the_formula_on_a_cpu_and_as_a_gpu_computes_them(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = random_tensor(shape, dtype)
    expected = slow_sums(tensor)
    assert sums_of(tensor) == expected
    monkeypatch.setattr(module, "_sums_on_cpu", lambda blocks: module._sums_on_gpu(blocks, tensor.device))
    for max_rows in (1, 2, 100):
        monkeypatch.setattr(module, "_MAX_ROWS_CPU", max_rows)
        assert sums_of(tensor) == expected


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_sums_of_slices_with_their_offsets_add_up_to_those_of_the_tensor(dtype: torch.dtype) -> None:
    tensor = random_tensor((3, ROW + 7), dtype)
    flat = tensor.flatten()
    cuts = [0, 0, 1, 2, 5, ROW - 3, 2 * ROW + 1, len(flat)]
    parts = [flat[start:end].clone() for start, end in pairwise(cuts)]
    sums = torch.stack([content_sums(part, offset=start) for start, part in zip(cuts, parts, strict=False)]).sum(0)
    assert digest_of_sums(dtype, tensor.shape, sums) == digest(tensor)
    assert sums_of(flat[1:], offset=1) == sums_of(flat[1:].clone(), offset=1), "a view that begins within a word"


def test_any_single_flipped_bit_changes_both_sums() -> None:
    tensor = random_tensor((2, ROW + 1))
    before = sums_of(tensor)
    words = tensor.view(-1).view(torch.int32)
    for place in (0, 1, 2, 1023, ROW - 1, ROW, 2 * ROW + 1):
        for bit in range(32):
            flip = torch.tensor(-(2**31) if bit == 31 else 2**bit, dtype=torch.int32)
            words[place] ^= flip
            after = sums_of(tensor)
            assert after[0] != before[0] and after[1] != before[1], (place, bit)
            words[place] ^= flip
    assert sums_of(tensor) == before


@pytest.mark.parametrize("bit", range(32))
def test_two_exchanged_words_that_differ_in_a_single_bit_change_the_digest(bit: int) -> None:
    """Multiples of powers of two, where a product could wrap around to the same sum."""
    words = torch.zeros(2**15, dtype=torch.int32)
    words[0] = -(2**31) if bit == 31 else 2**bit
    digests = {digest(words)}
    places = [*(2**power for power in range(15)), 3, ROW + 1, 2**15 - 1]
    for place in places:
        exchanged = words.clone()
        exchanged[[0, place]] = words[[place, 0]]
        digests.add(digest(exchanged))
    assert len(digests) == 1 + len(places)


@pytest.mark.parametrize("width", [1, 64, ROW, ROW + 1])
def test_permuted_rows_change_the_digest(width: int) -> None:
    tensor = random_tensor((6, width))
    orders = [torch.randperm(6, generator=torch.Generator().manual_seed(seed)) for seed in range(40)]
    orders += [torch.tensor(order) for order in ((1, 0, 3, 2, 5, 4), (1, 2, 0, 3, 4, 5), (5, 4, 3, 2, 1, 0))]
    distinct = {tuple(order.tolist()) for order in orders} | {(0, 1, 2, 3, 4, 5)}
    assert len({digest(tensor[list(order)]) for order in distinct}) == len(distinct)


def test_two_pairs_of_equal_rows_that_are_exchanged_change_the_digest() -> None:
    """Multipliers that grow evenly, as those of the first sum do, leave it as it is."""
    first, second = random_tensor((ROW,), seed=1), random_tensor((ROW,), seed=2)
    before, after = torch.stack([first, second, second, first]), torch.stack([second, first, first, second])
    assert sums_of(before)[0] == sums_of(after)[0]
    assert digest(before) != digest(after)


def test_the_device_of_a_tensor_chooses_the_algorithm_unless_it_is_given() -> None:
    tensor = random_tensor((3, 5))
    by_word_sums, by_xxh3 = (digest(tensor, algorithm) for algorithm in (WORD_SUMS, XXH3))
    assert sync_digests({"x": tensor}) == {"x": by_xxh3}
    assert digest_of_sums(tensor.dtype, tensor.shape, content_sums(tensor)) == by_word_sums != by_xxh3
    assert algorithm_on("cpu") == XXH3 and algorithm_on("cuda") == WORD_SUMS


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_byte_of_a_tensor_of_any_dtype_counts(algorithm: str) -> None:
    for dtype in KINDS:
        tensor = random_tensor((3, 5), dtype)
        content = tensor.view(-1).view(torch.uint8)
        digests = {digest(tensor, algorithm)}
        for place in range(len(content)):
            content[place] ^= 1
            digests.add(digest(tensor, algorithm))
            content[place] ^= 1
        assert len(digests) == 1 + len(content), dtype


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_zeros_other_shapes_other_dtypes_and_other_places_have_other_digests(algorithm: str) -> None:
    tensor = random_tensor((4, 6))
    others = [
        torch.zeros_like(tensor), tensor.T, tensor.view(6, 4), tensor.view(-1), tensor.view(torch.int32),
        tensor.bfloat16(), tensor[:3], torch.cat([tensor, torch.zeros(1, 6)]), tensor.roll(1, 0), tensor.roll(1, 1),
        torch.zeros(4, 6).bfloat16(), torch.zeros(6, 4),
    ]  # fmt: skip
    assert len({digest(other, algorithm) for other in [tensor, *others]}) == 1 + len(others)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_digests_are_of_the_moment_and_do_not_depend_on_the_layout_in_memory(algorithm: str) -> None:
    tensor = random_tensor((5, 7), torch.bfloat16)
    inside = torch.zeros(9, 15, dtype=torch.bfloat16)[1:6, 3:10]
    inside.copy_(tensor)
    pending = PendingDigests()
    pending.add("tensor", tensor, algorithm=algorithm)
    pending.add("inside", inside, algorithm=algorithm)
    tensor.zero_()
    digests = pending.read()
    assert digests["tensor"] == digests["inside"] == digest(inside, algorithm) != digest(tensor, algorithm)
    assert list(digests) == ["tensor", "inside"] and len(digests["tensor"]) == 32
    assert sync_digests({}) == {}


def test_all_sums_of_an_update_come_to_the_host_in_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    pending = PendingDigests()
    for number in range(5):
        pending.add(str(number), random_tensor((3, number)), algorithm=WORD_SUMS)
    transfers = []
    tolist = Tensor.tolist

    def counted(tensor: Tensor) -> object:
        transfers.append(tensor.shape)
        return tolist(tensor)

    monkeypatch.setattr(Tensor, "tolist", counted)
    assert len(set(pending.read().values())) == 5
    assert transfers == [(5, 2)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_digests_of_a_real_gpu_are_those_of_a_cpu(dtype: torch.dtype) -> None:
    tensors = {str(size): random_tensor((size,), dtype) for size in (1, ROW, 5 * ROW + 3, 2**24 + 1)}
    on_gpu = {name: tensor.cuda() for name, tensor in tensors.items()}
    assert sync_digests(on_gpu) == sync_digests(tensors, algorithm=WORD_SUMS)
    assert sync_digests(on_gpu, algorithm=XXH3) == sync_digests(tensors)
    flat = tensors[str(5 * ROW + 3)].cuda()
    parts = content_sums(flat[:ROW]) + content_sums(flat[ROW:], offset=ROW)
    assert torch.equal(parts, content_sums(flat))

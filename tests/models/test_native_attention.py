"""Compiled attention against blocks of torch's products in float64, over random layouts, and where it is not taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignlab.errors import ConfigError
from alignlab.models.native_attention import choice
from alignlab.models.native_attention.binding import kernels_of, tensor_struct
from alignlab.models.native_attention.function import native_attention
from alignlab.models.packed_attention import packed_attention
from alignlab.native.build import COMPILER, BuildError
from alignlab.native.processor import missing_flags
from alignlab.types import Segments


def _has(dtype: torch.dtype) -> bool:
    try:
        return not missing_flags(dtype) and kernels_of(dtype) is not None
    except BuildError:
        return False


needs_kernels = pytest.mark.skipif(not _has(torch.float32), reason=f"needs AVX-512 and {COMPILER}")
needs_bfloat16 = pytest.mark.skipif(not _has(torch.bfloat16), reason=f"needs AVX-512 with bf16 and {COMPILER}")


@pytest.fixture(autouse=True)
def mode() -> Iterator[None]:
    """Leave the choice as it was."""
    yield
    choice.set_native_attention("auto")


def layout(groups: Sequence[Sequence[int]]) -> Segments:
    """Segments of prompts with their completions: [prompt, completion, ...] each."""
    lengths, prefixes = [], []
    for prompt, *completions in groups:
        prefixes += [-1] + [len(lengths)] * len(completions)
        lengths += [prompt, *completions]
    count = len(lengths)
    return Segments(tuple(lengths), tuple(prefixes), tuple(range(count)), (0,) * count)


def tensors(segments: Segments, shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Query, key, value and the output's gradient, as projections lay them out."""
    heads, kv_heads, size, value_size = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(heads, size), (kv_heads, size), (kv_heads, value_size), (heads, value_size)]
    made = [torch.randn(1, segments.num_tokens, h, d, generator=generator).to(dtype) for h, d in sizes]
    return [x.transpose(1, 2) for x in made[:3]] + made[3:]


def computed(attend: Any, given: Sequence[Tensor], segments: Segments, sinks: Tensor | None, **options: Any) -> list:
    """Output and gradients of query, key, value and sinks."""
    *inputs, grad = [x.detach().clone() for x in given]
    inputs = [x.requires_grad_() for x in inputs]
    sinks = None if sinks is None else sinks.to(grad.dtype).requires_grad_()
    output = attend(*inputs, segments, sinks=sinks, **options)
    output.backward(grad)
    return [output.detach(), *(x.grad for x in inputs), *([] if sinks is None else [sinks.grad])]


def errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Distances relative to the tensor, or to the output: gradients of a token that sees itself alone are 0."""
    least = expected[0].norm()
    pairs = zip(found, expected, strict=True)
    return [float((x.double() - y).norm() / torch.maximum(y.norm(), least)) for x, y in pairs]


SHAPES = [(9, 3, 64, 64), (4, 2, 16, 16), (3, 3, 32, 48), (2, 1, 128, 96), (6, 2, 80, 16)]
GROUPS = st.lists(
    st.lists(st.one_of(st.integers(1, 70), st.sampled_from([1, 16, 64, 65, 257, 300])), min_size=1, max_size=4),
    min_size=1, max_size=3,
)  # fmt: skip


@needs_kernels
@settings(max_examples=40, deadline=None)
@given(
    groups=GROUPS, shape=st.sampled_from(SHAPES), window=st.sampled_from([None, 1, 7, 64, 200]),
    softcap=st.sampled_from([None, 2.0]), has_sinks=st.booleans(), seed=st.integers(0, 9),
)
def test_float32_is_that_of_the_blocks(
    groups: list[list[int]], shape: Any, window: int | None, softcap: float | None, has_sinks: bool, seed: int
) -> None:
    segments = layout(groups)
    given = tensors(segments, shape, torch.float32, seed)
    sinks = torch.linspace(-2, 2, shape[0]) if has_sinks else None
    options: dict[str, Any] = {"scaling": 0.3, "sliding_window": window, "softcap": softcap}
    expected = computed(packed_attention, [x.double() for x in given], segments, sinks, **options)
    found = computed(native_attention, given, segments, sinks, **options)
    assert max(errors(found, expected)) < 2e-6
    assert [x.shape for x in found] == [x.shape for x in expected]


@needs_kernels
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_no_number_stays_none_for_all_who_see_it(which: int, softcap: float | None) -> None:
    segments = layout([[40]])
    given = tensors(segments, (2, 1, 16, 16), torch.float32)[:3]
    given[2] *= 0.01  # weights that were large in place of nan would leave the values finite
    given[which][0, 0, 3] = torch.nan
    output = native_attention(*given, segments, scaling=0.3, softcap=softcap)
    sees_it = torch.arange(40) == 3 if which == 0 else torch.arange(40) >= 3
    assert torch.equal(output[0, :, 0].isnan().all(-1), sees_it) and output[0, ~sees_it].isfinite().all()


@needs_bfloat16
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_bfloat16_is_as_near_as_the_blocks(shape: Any) -> None:
    segments = layout([[300, 65, 20, 130], [5, 40], [90]])
    given = tensors(segments, shape, torch.bfloat16)
    sinks = torch.linspace(-2, 2, shape[0])
    exact = [x.double() for x in given]
    for options in ({"scaling": 0.2}, {"scaling": 0.2, "sliding_window": 64, "softcap": 5.0}):
        expected = computed(packed_attention, exact, segments, sinks, **options)
        choice.set_native_attention("off")
        blocks = errors(computed(packed_attention, given, segments, sinks, **options), expected)
        choice.set_native_attention("auto")
        kernels = errors(computed(packed_attention, given, segments, sinks, **options), expected)
        assert blocks != kernels
        assert all(kernel < 1.2 * block for kernel, block in zip(kernels[:4], blocks[:4], strict=True))
        assert kernels[4] < 0.02


@needs_bfloat16
def test_results_depend_on_no_other_sequence_and_no_number_of_threads() -> None:
    alone, beside = layout([[100, 30]]), layout([[100, 30], [64, 64, 64, 3]])
    given = tensors(beside, SHAPES[0], torch.bfloat16)
    threads = torch.get_num_threads()
    whole = computed(native_attention, given, beside, None, scaling=0.125)
    first = computed(
        native_attention, [x[:, :, :130] for x in given[:3]] + [given[3][:, :130]], alone, None, scaling=0.125
    )
    try:
        torch.set_num_threads(3)
        again = computed(native_attention, given, beside, None, scaling=0.125)
    finally:
        torch.set_num_threads(threads)
    for x, y, z in zip(whole, first, again, strict=True):
        assert torch.equal(x, z)
        tokens = 1 if x.shape[1] == beside.num_tokens else 2
        assert torch.equal(x.narrow(tokens, 0, 130), y)


@needs_bfloat16
def test_layouts_that_kernels_cannot_read_are_copied() -> None:
    segments = layout([[20, 7]])
    query, key, value, grad = tensors(segments, SHAPES[1], torch.bfloat16)
    odd = torch.empty(1 + key.numel(), dtype=torch.bfloat16)[1:].view_as(key).copy_(key)
    strided = torch.stack([value, value], dim=-1)[..., 0]
    expected = computed(native_attention, [query, key, value, grad], segments, None, scaling=0.25)
    found = computed(native_attention, [query, odd, strided, grad], segments, None, scaling=0.25)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert odd.is_contiguous() and odd.data_ptr() % 4, "it is read as it lies, without the copies of `computed`"
    assert torch.equal(native_attention(query, odd, value, segments, scaling=0.25), expected[0])
    with pytest.raises(ValueError, match=r"a kernel reads torch\.bfloat16"):
        tensor_struct(strided, 27, 2, 16, torch.bfloat16)
    with pytest.raises(ValueError, match=r"27 tokens of 4 heads on 2 do not fit segments of 4"):
        native_attention(query, key, value, layout([[4]]), scaling=1.0)


def test_float32_odd_heads_and_what_has_no_numbers_are_torch_s() -> None:
    bfloat16 = torch.zeros(1, 2, 3, 16, dtype=torch.bfloat16)
    assert not choice.is_native(bfloat16.float(), bfloat16)
    assert not choice.is_native(torch.zeros(1, 2, 3, 24, dtype=torch.bfloat16), bfloat16)
    assert not choice.is_native(bfloat16, torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16))
    assert not choice.is_native(torch.nn.Parameter(bfloat16), bfloat16)
    assert not choice.is_native(bfloat16.to("meta"), bfloat16)
    choice.set_native_attention("off")
    assert not choice.is_native(bfloat16, bfloat16)


def test_a_machine_without_a_compiler_says_so_once_and_computes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(dtype: torch.dtype) -> None:
        raise BuildError("there is no compiler g++ on the PATH; install one")

    monkeypatch.setattr(choice, "kernels_of", fail)
    monkeypatch.setattr(choice, "missing_flags", lambda dtype: [])
    choice._why_not.cache_clear()
    caplog.set_level("INFO")
    bfloat16 = torch.zeros(1, 2, 3, 16, dtype=torch.bfloat16)
    try:
        assert not choice.is_native(bfloat16, bfloat16) and not choice.is_native(bfloat16, bfloat16)
        assert caplog.text.count("computed by torch, not by the compiled kernels: there is no compiler g++") == 1
        with pytest.raises(ConfigError, match=r"native_attention is required.* no compiler g\+\+ .*or use auto"):
            choice.set_native_attention("required")
        monkeypatch.setattr(choice, "missing_flags", lambda dtype: ["avx512_bf16"])
        choice._why_not.cache_clear()
        with pytest.raises(ConfigError, match="the processor has no avx512_bf16"):
            choice.set_native_attention("required")
    finally:
        choice._why_not.cache_clear()

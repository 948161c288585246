"""FlexAttention on packs: its mask, made on the host, and how often it is compiled. Kernels need a GPU."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torch_flex

from alignlab.models import flex_attention
from alignlab.models.flex_attention import BLOCK, block_mask, flex_packed_attention, padded_to_blocks, visible_pairs
from alignlab.types import Segments
from tests.models.conftest import make_segments, packs
from tests.reference.attention import dense_attention, visible

CPU = torch.device("cpu")
BLOCKS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices",
          "full_q_num_blocks", "full_q_indices")
LONG_PACKS = st.one_of(packs(9), packs(150), packs(400))
WINDOWS = st.sampled_from([None, 1, 4, 100, 300])


@settings(max_examples=25, deadline=None)
@given(LONG_PACKS, WINDOWS)
def test_the_mask_of_blocks_equals_the_one_that_torch_makes_of_all_pairs(groups: Any, window: int | None) -> None:
    segments = make_segments(groups)
    ours = block_mask(segments, window, CPU)
    count = ours.seq_lengths[0]
    assert count % BLOCK == 0 and count >= 2 * BLOCK
    theirs = torch_flex.create_block_mask(ours.mask_mod, None, None, count, count, device="cpu")
    assert ours.seq_lengths == theirs.seq_lengths and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for name in BLOCKS:
        mine, expected = getattr(ours, name), getattr(theirs, name)
        assert mine.dtype == expected.dtype and torch.equal(mine, expected), name


@settings(max_examples=25, deadline=None)
@given(st.one_of(packs(9), packs(50)), WINDOWS)
def test_the_rule_of_the_mask_is_visibility_and_padding_sees_itself_alone(groups: Any, window: int | None) -> None:
    segments = make_segments(groups)
    padded = padded_to_blocks(segments)
    index, zero = torch.arange(padded.num_tokens), torch.tensor(0)
    dense = block_mask(segments, window, CPU).mask_mod(zero, zero, index[:, None], index[None, :])
    count = segments.num_tokens
    assert torch.equal(dense[:count, :count], visible(segments, window))
    assert not dense[:count, count:].any() and not dense[count:, :count].any()
    assert dense.any(dim=1).all(), "a query that sees no key has no softmax"
    blocks = padded.num_tokens // BLOCK
    pairs = dense.view(blocks, BLOCK, blocks, BLOCK).sum((1, 3))
    assert torch.equal(visible_pairs(padded, window), pairs)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("lengths", [(5, [3, 1, 6]), (150, [100, 33])], ids=["one block", "padded"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (None, 1.5)])
def test_flex_attention_equals_the_dense_mask(
    lengths: tuple[int, list[int]], window: int | None, softcap: float | None
) -> None:
    segments = make_segments([lengths, (7, []), (2, [4, 4])])
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(1, heads, segments.num_tokens, 8, generator=generator) for heads in (4, 2, 2)]
    options: dict[str, Any] = {"scaling": 0.4, "sliding_window": window, "softcap": softcap}
    out = flex_packed_attention(*x, segments, flex=torch_flex.flex_attention, **options)
    torch.testing.assert_close(out.double(), dense_attention(*x, segments, **options), rtol=1e-5, atol=1e-5)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Counts traces of the compiled FlexAttention, which runs uncompiled."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)  # it refuses a gradient on a CPU
    flex_attention._compiled_flex.cache_clear()
    yield counter
    flex_attention._compiled_flex.cache_clear()


def random_segments(rng: random.Random, scale: int) -> Segments:
    groups = [
        (rng.randint(5, 60) * scale, [rng.randint(3, 40) * scale for _ in range(rng.randint(1, 4))])
        for _ in range(rng.randint(1, 3))
    ]
    return make_segments(groups)


def attend(
    segments: Segments, *, heads: int, kv_heads: int, size: int, grad: str, window: int | None, softcap: float | None,
    has_sinks: bool = False,
) -> None:
    """Attend as a layer does: `grad` is "none", "all", or "no key" for the first layer under an adapter."""
    sinks = torch.randn(heads, requires_grad=grad == "all") if has_sinks else None
    q, k, v = (torch.randn(1, segments.num_tokens, n, size).transpose(1, 2) for n in (heads, kv_heads, kv_heads))
    for tensor in {"none": [], "all": [q, k, v], "no key": [q, v]}[grad]:
        tensor.requires_grad_()
    with torch.set_grad_enabled(grad != "none"):
        flex_packed_attention(q, k, v, segments, scaling=0.25, sliding_window=window, softcap=softcap, sinks=sinks)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch's tracer
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (64, None), (None, 30.0)])
def test_packs_of_all_sizes_share_at_most_three_traces_of_a_configuration(
    counter: Any, window: int | None, softcap: float | None, has_sinks: bool
) -> None:
    rng = random.Random(0)
    for number in range(50):
        segments = random_segments(rng, scale=rng.choice([1, 1, 4]))
        grad = ("none", "all", "no key")[number % 3]
        options: dict[str, Any] = {"window": window, "softcap": softcap, "has_sinks": has_sinks}
        attend(segments, heads=4, kv_heads=2, size=16, grad=grad, **options)
    assert 1 <= counter.frame_count <= 3


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_recompile_limit_is_an_error_and_never_a_dense_attention(
    counter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex_attention, "_RECOMPILE_LIMIT", 1)
    segments = random_segments(random.Random(0), scale=1)
    options: dict[str, Any] = {"heads": 4, "kv_heads": 2, "window": None, "softcap": None, "size": 16}
    attend(segments, grad="none", **options)
    with pytest.raises(FailOnRecompileLimitHit):
        attend(segments, grad="all", **options)

"""Packed attention against a dense mask, and against each sequence computed alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from alignlab.models import attention_plan
from alignlab.models.attention_plan import attention_blocks
from alignlab.models.packed_attention import packed_attention
from alignlab.types import Segments
from tests.models.conftest import make_segments, packs, sequences_of
from tests.reference.attention import dense_attention, visible

HEADS = st.sampled_from([(1, 1), (4, 2), (6, 1)])
WINDOWS = st.sampled_from([None, 1, 4])


def inputs(segments: Segments, heads: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    counts = (heads[0], heads[1], heads[1])
    return [
        torch.randn(1, n, segments.num_tokens, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for n in counts
    ]


def relative_errors(ours: torch.Tensor, x: list, theirs: torch.Tensor, y: list) -> list[float]:
    """Largest error of the output and of each gradient, relative to the largest entry, or to 1 if all are smaller."""
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours.backward(grad.to(ours.dtype))
    theirs.backward(grad.to(ours.dtype).to(theirs.dtype))
    pairs = [(ours.detach(), theirs.detach()), *((a.grad, b.grad) for a, b in zip(x, y, strict=True))]
    return [((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1)).item() for a, b in pairs]


@settings(max_examples=40, deadline=None)
@given(packs(), HEADS, WINDOWS, st.sampled_from([None, 1.5]), st.integers(0, 9))
def test_equals_the_dense_mask(groups, heads, window, softcap, seed):
    segments = make_segments(groups)
    x, y = (inputs(segments, heads, torch.float64, seed) for _ in range(2))
    options = {"scaling": 0.4, "sliding_window": window, "softcap": softcap}
    errors = relative_errors(
        packed_attention(*x, segments, **options), x, dense_attention(*y, segments, **options), y
    )
    assert max(errors) < 1e-9


@settings(max_examples=25, deadline=None)
@given(packs(), HEADS)
def test_sharing_a_prompt_equals_copying_it(groups, heads):
    segments = make_segments(groups)
    x, y = (inputs(segments, heads, torch.float32) for _ in range(2))
    ours = packed_attention(*x, segments, scaling=0.3)
    alone = torch.zeros_like(ours)
    for index in sequences_of(segments):
        q, k, v = (t[:, :, index] for t in y)
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2)
        own = segments.sequence_of_token[index] >= 0  # a prompt's output is any completion's; below, the first one's
        fresh = own | (alone[0, index].abs().sum((-1, -2)) == 0)
        alone = alone.index_add(1, index[fresh], out[:, fresh])
    assert max(relative_errors(ours, x, alone, y)) < 1e-5


@pytest.mark.parametrize("window", [None, 12])
def test_bfloat16_is_off_by_its_rounding(window):
    segments = make_segments([(30, [40, 25]), (50, [])])
    x = inputs(segments, (4, 2), torch.bfloat16)
    y = [t.detach().double().requires_grad_() for t in x]
    options = {"scaling": 0.35, "sliding_window": window}
    ours, twin = packed_attention(*x, segments, **options), dense_attention(*y, segments, **options)
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours.backward(grad)
    twin.backward(grad.double())
    for mine, exact in [(ours, twin), *((a.grad, b.grad) for a, b in zip(x, y, strict=True))]:
        assert (mine.double() - exact).norm() < 0.01 * exact.norm()  # half a unit in the last place is 0.002


@pytest.mark.parametrize("window", [None, 10])
def test_long_segments_are_cut_into_blocks(monkeypatch, window):
    monkeypatch.setattr(attention_plan, "MAX_SCORES", 200)
    monkeypatch.setattr(attention_plan, "MAX_ROWS", 7)
    segments = make_segments([(40, [23, 3]), (31, [])])
    blocks = attention_blocks(segments, window)
    assert len(blocks) > 10
    x, y = (inputs(segments, (4, 2), torch.float64) for _ in range(2))
    options = {"scaling": 0.4, "sliding_window": window}
    errors = relative_errors(packed_attention(*x, segments, **options), x, dense_attention(*y, segments, **options), y)
    assert max(errors) < 1e-9


@settings(max_examples=25, deadline=None)
@given(packs(), WINDOWS)
def test_blocks_hold_every_visible_pair_once(groups, window):
    segments = make_segments(groups)
    count = segments.num_tokens
    pairs = torch.zeros(count + 1, count + 1, dtype=torch.int64)
    for block in attention_blocks(segments, window):
        rows, columns = block.queries.shape[1], block.keys.shape[1]
        bias = torch.zeros(1, rows, columns) if block.bias is None else block.bias
        seen = (bias == 0).expand(len(block.queries), rows, columns)
        q, k = block.queries[:, :, None].expand_as(seen), block.keys[:, None, :].expand_as(seen)
        pairs.index_put_((q[seen], k[seen]), torch.tensor(1), accumulate=True)
    assert torch.equal(pairs[:count, :count], visible(segments, window).long())
    assert int(pairs[:count, count].sum()) == 0, "padded keys are hidden"


def test_keys_of_a_prompt_are_read_once_for_all_its_completions():
    blocks = attention_blocks(make_segments([(50, [8] * 16)]), None)
    assert [(b.queries.shape[1], b.keys.shape[1]) for b in blocks if not b.first] == [(128, 50)]


def test_blocks_are_made_once(pack):
    assert attention_blocks(pack, None) is attention_blocks(pack, None)
    assert attention_blocks(pack, None) is not attention_blocks(pack, 3)


def test_autocast_computes_in_its_dtype_and_keeps_the_softmax_exact(pack):
    x = inputs(pack, (4, 2), torch.float32)
    rounded = [t.detach().bfloat16() for t in x]
    with torch.autocast("cpu", torch.bfloat16):
        out = packed_attention(*x, pack, scaling=0.35)
        out.sum().backward()
    assert torch.equal(out, packed_attention(*rounded, pack, scaling=0.35))
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in x)

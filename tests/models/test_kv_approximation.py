"""Approximations of keys and values: by hand, and replayed against a slow twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from alignlab.models.kv_approximation.eviction import WindowedTokens
from alignlab.models.kv_approximation.groups import GroupedRounding, from_int4, to_int4
from alignlab.models.kv_approximation.record import Parities, parities_of, record_of_layers
from alignlab.models.kv_approximation.rounding import Rounding, to_float8, to_int8
from alignlab.models.kv_approximation.straight_through import straight_through
from alignlab.models.sink_window import SinkWindow
from alignlab.types import Segments
from tests.models.conftest import make_segments, packs
from tests.reference.attention import dense_attention, visible

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


@settings(max_examples=15, deadline=None)
@given(packs(), st.integers(1, 6), st.integers(0, 4))
def test_replayed_window_sees_sinks_and_the_newest_tokens(groups, size: int, sinks: int) -> None:
    segments = make_segments(groups)
    query, key, value = inputs(segments.num_tokens, torch.float64)
    window = WindowedTokens(SinkWindow(size, sinks))
    output = window.attend(query, key, value, segments, scaling=0.4, sliding_window=None, softcap=None, sinks=None)
    positions = segments.position_ids
    distance = positions[:, None] - positions
    mask = visible(segments) & ((distance < size) | (positions < sinks))
    repeated = (x.repeat_interleave(2, dim=1) for x in (key, value))
    expected = scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.4).transpose(1, 2)
    torch.testing.assert_close(output, expected, atol=1e-9, rtol=0)


def test_int4_by_hand() -> None:
    """Along a vector and along a group: code 0 is the lowest number, code 15 the highest."""
    x = torch.tensor([[1.0, 2.5, -0.5, 0.7], [3.0, 2.5, 7.0, 0.7]])
    rounded = to_int4(x, over=1)
    # First row: low -0.5, scale 3 / 15 = 0.2: codes 7.5 -> 8, 15, 0, 6. Second: low 0.7, scale 0.42: 5.48, 4.29, 15, 0.
    assert rounded.codes.tolist() == [[8 | 0 << 4, 15 | 6 << 4], [5 | 15 << 4, 4 | 0 << 4]]
    torch.testing.assert_close(rounded.scales, torch.tensor([[0.2], [0.42]]))
    expected = torch.tensor([[1.1, 2.5, -0.5, 0.7], [2.8, 2.38, 7.0, 0.7]])
    torch.testing.assert_close(from_int4(rounded, torch.empty(2, 4)), expected)
    rounded = to_int4(x, over=0)
    torch.testing.assert_close(rounded.lows, torch.tensor([[1.0, 2.5, -0.5, 0.7]]))
    torch.testing.assert_close(from_int4(rounded, torch.empty(2, 4)), x)


def grouped_twin(query: Tensor, key: Tensor, value: Tensor, segments: Segments, rounding: GroupedRounding) -> Tensor:
    """Return [1,H,N,V] in float64, one query at a time, each against its own sequence."""
    output = torch.zeros_like(query)
    for i, segment in enumerate(segments.segment_of_token.tolist()):
        prefix = segments.prefixes[segment]
        tokens = []
        if prefix >= 0:
            tokens += range(segments.starts[prefix], segments.starts[prefix] + segments.lengths[prefix])
        tokens += range(segments.starts[segment], i + 1)
        num_old = max(0, ((len(tokens) - 1) // rounding.group - rounding.recent) * rounding.group)
        keys, values = (x[0, :, tokens].transpose(0, 1) for x in (key, value))  # [L,K,D]
        for start in range(0, num_old, rounding.group):
            part = slice(start, start + rounding.group)
            old_keys, old_values = keys[part].detach().clone(), values[part].detach().clone()
            for head in range(key.shape[1]):
                for channel in range(key.shape[3]):
                    old_keys[:, head, channel] = levels(old_keys[:, head, channel])
                for token in range(rounding.group):
                    old_values[token, head] = levels(old_values[token, head])
            keys = torch.cat((keys[:start], straight_through(keys[part], old_keys), keys[part.stop :]))
            values = torch.cat((values[:start], straight_through(values[part], old_values), values[part.stop :]))
        distance = torch.arange(len(tokens) - 1, -1, -1)
        for head in range(query.shape[1]):
            kv = head // (query.shape[1] // key.shape[1])
            scores = 1.5 * torch.tanh(keys[:, kv] @ query[0, head, i] * 0.4 / 1.5)
            output[0, head, i] = scores.masked_fill(distance >= 9, -torch.inf).softmax(0) @ values[:, kv]
    return output


def levels(x: Tensor) -> Tensor:
    """Return numbers moved to the nearest of 16 levels between the lowest and the highest."""
    grid = x.min() + (x.max() - x.min()) * torch.arange(16, dtype=x.dtype) / 15
    return grid[(x[:, None] - grid).abs().argmin(1)]


@settings(max_examples=12, deadline=None)
@given(packs(), st.integers(1, 4), st.integers(0, 2))
def test_replayed_groups_equal_one_query_at_a_time(groups, group: int, recent: int) -> None:
    """Groups that a prompt ends within are other ones in each completion; values, gradients, window and soft-cap."""
    segments, rounding = make_segments(groups), GroupedRounding(group, recent)
    ours, twins = ([x.detach().requires_grad_() for x in inputs(segments.num_tokens, torch.float64)] for _ in range(2))
    output = rounding.attend(*ours, segments, scaling=0.4, sliding_window=9, softcap=1.5, sinks=None).transpose(1, 2)
    expected = grouped_twin(*twins, segments, rounding)
    torch.testing.assert_close(output, expected, atol=1e-9, rtol=0)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, other in zip(ours, twins, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-9, rtol=0)


def test_a_long_sequence_is_cut_into_runs_of_queries() -> None:
    segments, rounding = make_segments([(300, [70, 90]), (210, [])]), GroupedRounding(8, 1)
    tensors = inputs(segments.num_tokens, torch.float64)
    options = {"scaling": 0.4, "sliding_window": None, "softcap": None, "sinks": None}
    output = rounding.attend(*tensors, segments, **options)
    for segment, prefix in ((1, 0), (2, 0), (3, -1)):
        parts = [i for i in (prefix, segment) if i >= 0]
        runs = [range(segments.starts[i], segments.starts[i] + segments.lengths[i]) for i in parts]
        tokens = torch.tensor([token for run in runs for token in run])
        alone = rounding.attend(*(x[:, :, tokens] for x in tensors), Segments.single(len(tokens)), **options)
        own = slice(len(tokens) - segments.lengths[segment], None)
        torch.testing.assert_close(output[:, tokens[own]], alone[:, own], atol=1e-9, rtol=0)


@pytest.mark.parametrize("bits", ["int8", "fp8", "int4"])
def test_recorded_parities_give_the_same_codes_to_numbers_that_are_a_little_off(bits: str) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(64, 2, 16, generator=generator)
    other = x * (1 + 5e-4 * torch.randn(x.shape, generator=generator))

    def codes(x: Tensor, parities: Parities | None = None) -> Tensor:
        if bits != "int4":
            return Rounding(bits).encode(x, parities)[0]
        packed = to_int4(x, 2, parities).codes
        return torch.cat((packed & 15, packed >> 4), dim=-1)

    expected, known = codes(x), torch.ones(64, 1, 1, dtype=torch.bool)
    parities = Parities((expected & 1).to(torch.uint8), known)
    assert (codes(other) != expected).any()
    assert torch.equal(codes(other, parities), expected)
    assert torch.equal(codes(other, parities._replace(known=~known)), codes(other))


def test_a_code_of_the_other_parity_gives_way_to_the_next_one_beyond_the_number() -> None:
    """Numbers 1.4, -1.4, 126.8 and 0.2 in units of the scale, whose nearest codes are 1, -1, 127 and 0."""
    x, odd = torch.tensor([1.4, -1.4, 126.8, 0.2, 127.0]), torch.tensor([True])
    for bits, codes in (((1, 1, 1, 0, 1), [1, -1, 127, 0, 127]), ((0, 0, 0, 1, 1), [2, -2, 126, 1, 127])):
        assert to_int8(x, Parities(torch.tensor(bits, dtype=torch.uint8), odd))[0].tolist() == codes


def test_bits_of_a_layer_are_read_back_in_the_layout_of_keys_and_values() -> None:
    generator = torch.Generator().manual_seed(5)
    keys, values = (torch.randint(0, 2, (5, n), generator=generator, dtype=torch.uint8) for n in (2 * 3, 2 * 5))
    known = torch.tensor([True, False, True, True, False])
    record = record_of_layers({1: (keys, values, known), 3: (values, keys, ~known)}, 4)
    assert record.shape == (5, 4, 1 + 1 + 2) and record.dtype == torch.uint8 and not record[:, [0, 2]].any()
    of_keys, of_values = parities_of(record[:, 1], torch.empty(1, 2, 5, 3), torch.empty(1, 2, 5, 5))
    assert torch.equal(of_keys.bits[0].transpose(0, 1).flatten(1), keys)
    assert torch.equal(of_values.bits[0].transpose(0, 1).flatten(1), values)
    assert of_keys.known.flatten().tolist() == known.tolist()
    of_keys, _ = parities_of(record[:, 3], torch.empty(1, 2, 5, 5), torch.empty(1, 2, 5, 3))
    assert torch.equal(of_keys.bits[0].transpose(0, 1).flatten(1), values)

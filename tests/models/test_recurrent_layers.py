"""Recurrent layers: against the recurrence one token at a time, by hand, and against `transformers`, in float64."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize, silu
from transformers import KimiLinearConfig, Qwen3_5TextConfig, Qwen3NextConfig
from transformers.models.kimi_linear.modeling_kimi_linear import (
    KimiLinearDeltaAttention,
    chunk_kimi_delta_attention,
)
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextGatedDeltaNet,
    torch_chunk_gated_delta_rule,
)

from alignlab.errors import ConfigError
from alignlab.models.attention_kinds import make_attention
from alignlab.models.config import PolicyConfig
from alignlab.models.recurrent import chunk_plan, delta_rule
from alignlab.models.recurrent.convolution import ShortConvolution
from alignlab.models.recurrent.delta_rule import delta_step, packed_delta_rule
from alignlab.models.recurrent.runs import Runs
from alignlab.types import Segments
from tests.models.attention_kinds import KIMI, RECURRENT, SHAPE, make_model
from tests.models.conftest import make_segments
from tests.reference.float64 import really_float64
from tests.reference.recurrent import recurrent_delta_rule

LENGTHS = st.sampled_from([1, 2, 15, 16, 17, 33])
LAYOUTS = st.lists(st.tuples(LENGTHS, st.lists(LENGTHS, max_size=3)), min_size=1, max_size=3)


def tensors(num_tokens: int, *, of_channels: bool, fast: bool = False, seed: int = 0) -> list[Tensor]:
    """Random query, key, value, log decay and strength, of 2 heads, keys of 3 and values of 4; a fast decay is -20."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(num_tokens, 2, size, generator=generator, dtype=torch.float64) for size in (3, 3, 4)
    )
    shape = (num_tokens, 2, 3) if of_channels else (num_tokens, 2)
    decay = -torch.rand(shape, generator=generator, dtype=torch.float64) * (20 if fast else 0.5)
    strength = torch.rand(num_tokens, 2, generator=generator, dtype=torch.float64)
    return [normalize(query, dim=-1), normalize(key, dim=-1), value, decay, strength]


def results(rule: Any, inputs: list[Tensor], segments: Segments, **options: Any) -> list[Tensor]:
    """Outputs and last states of a rule, and gradients of all inputs from both."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    start = options.get("start")
    if start is not None:
        options["start"] = start = start.detach().requires_grad_()
    outputs = rule(*inputs, segments, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in outputs]
    loss = sum((x * weight).sum() for x, weight in zip(outputs, weights, strict=True))
    grads = torch.autograd.grad(loss, inputs if start is None else [*inputs, start])
    return [*(x.detach() for x in outputs), *grads]


def assert_equal(ours: list[Tensor], exact: list[Tensor], tolerance: float = 1e-12) -> None:
    for mine, other in zip(ours, exact, strict=True):
        assert (mine - other).abs().max() <= tolerance * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("of_channels", [False, True], ids=["decay of a head", "decay of a channel"])
@settings(max_examples=20, deadline=None)
@given(LAYOUTS, st.integers(0, 9), st.booleans(), st.booleans())
def test_chunks_of_packed_sequences_equal_one_token_at_a_time(
    of_channels: bool, layout: Any, seed: int, fast: bool, has_start: bool
) -> None:
    segments = make_segments(layout)
    inputs = tensors(segments.num_tokens, of_channels=of_channels, fast=fast, seed=seed)
    start = None
    if has_start:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(len(segments.lengths), 2, 3, 4, generator=generator, dtype=torch.float64)
    exact = results(recurrent_delta_rule, inputs, segments, start=start)
    if start is not None:  # completions begin from their prompt, whatever stands in their row
        assert_equal([exact[-1][i] for i, prefix in enumerate(segments.prefixes) if prefix >= 0],
                     [torch.zeros(2, 3, 4)] * sum(prefix >= 0 for prefix in segments.prefixes), 0.0)
    with mock.patch.object(chunk_plan, "MAX_CHUNK", 16):
        assert_equal(results(packed_delta_rule, inputs, segments, start=start), exact)
        with mock.patch.object(delta_rule, "_SLAB_NUMEL", 1):  # a chunk at a time
            assert_equal(results(packed_delta_rule, inputs, make_segments(layout), start=start), exact)


def test_two_tokens_by_hand() -> None:
    """K = V = 1, keys and queries 1. S_1 = 0.5 * 4 = 2; half of it decays: 1; S_2 = 1 + 0.25 * (9 - 1) = 3."""
    ones = torch.ones(2, 1, 1)
    value, strength = torch.tensor([4.0, 9.0]).view(2, 1, 1), torch.tensor([0.5, 0.25]).view(2, 1)
    decay = torch.tensor([0.3, 0.5]).log().view(2, 1)  # of nothing, at first
    output, state = packed_delta_rule(ones, ones, value, decay, strength, Segments.single(2))
    torch.testing.assert_close(output.flatten(), torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(state.flatten(), torch.tensor([3.0]))
    output, state = delta_step(torch.full((1, 1, 1, 1), 2.0), ones[:1], ones[:1], value[1:], decay[1:], strength[1:])
    assert (output.item(), state.item()) == (pytest.approx(3.0), pytest.approx(3.0))


def test_the_chunk_size_is_bounded_by_the_longest_segment() -> None:
    assert [chunk_plan._chunk_size(longest) for longest in (1, 16, 17, 40, 64, 65, 5000)] == [
        16, 16, 32, 64, 64, 64, 64
    ]  # fmt: skip


def test_no_state_enters_another_sequence() -> None:
    """A change of one sequence changes nothing in the others, and a prompt's tokens change its completions."""
    segments = make_segments([(20, [18, 3]), (33, [])])
    inputs = tensors(segments.num_tokens, of_channels=False)
    before, _ = packed_delta_rule(*inputs, segments)
    changed = [x.clone() for x in inputs]
    changed[2][22] += 1  # in the first completion
    after, _ = packed_delta_rule(*changed, segments)
    moved = (after - before).abs().sum((1, 2)) > 0
    assert moved[22:38].all() and not moved[:22].any() and not moved[38:].any()
    changed[2][19] += 1  # the prompt's last token
    moved = (packed_delta_rule(*changed, segments)[0] - after).abs().sum((1, 2)) > 0
    assert moved[19:41].all() and not moved[41:].any()


def test_decays_per_channel_do_not_overflow_in_float32() -> None:
    query, key, value, _, strength = (x.float() for x in tensors(64, of_channels=True))
    decay = torch.full((64, 2, 3), -1.6)  # e^(1.6 * 64) is infinite in float32
    output, state = packed_delta_rule(query, key, value, decay, strength, Segments.single(64))
    exact, _ = recurrent_delta_rule(query, key, value, decay, strength, Segments.single(64))
    assert state.isfinite().all()
    torch.testing.assert_close(output, exact, atol=1e-6, rtol=1e-5)


def test_a_convolution_by_hand() -> None:
    """W = 3, weights 1, 10, 100; a completion of the prompt (1, 2) reads the prompt's tokens."""
    layer = ShortConvolution(1, 3).double()
    layer.weight.data = torch.tensor([1.0, 10.0, 100.0]).double().view(1, 1, 3)
    segments = make_segments([(2, [2, 1]), (1, [1])])
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]).double()[:, None]
    output, ends = layer(x, segments)
    expected = torch.tensor([100.0, 210.0, 321.0, 432.0, 521.0, 600.0, 760.0]).double()
    torch.testing.assert_close(output[:, 0], silu(expected))
    assert ends[..., 0].tolist() == [[1, 2], [3, 4], [2, 5], [0, 6], [6, 7]]
    one_more, kept = layer(torch.tensor([[8.0]]).double(), None, ends[1:2])
    torch.testing.assert_close(one_more[0, 0], silu(torch.tensor(3 + 40 + 800.0).double()))
    assert kept[0, :, 0].tolist() == [4, 8]


def make_layer(kind: str, sizes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = PolicyConfig(**{**SHAPE, "num_hidden_layers": 1, "layer_types": [kind], **sizes})
    return make_attention(config, 0).double()


HUB_SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 50, "layer_types": ["linear_attention"],
    "rms_norm_eps": 1e-6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OF_HUB = {
    "gated_deltanet": (RECURRENT, lambda: Qwen3_5GatedDeltaNet(Qwen3_5TextConfig(**HUB_SIZES, **RECURRENT), 0)),
    "fused_gated_deltanet": (RECURRENT, lambda: Qwen3NextGatedDeltaNet(Qwen3NextConfig(**HUB_SIZES, **RECURRENT), 0)),
    "kimi_delta_attention": (KIMI, lambda: KimiLinearDeltaAttention(
        KimiLinearConfig(**HUB_SIZES, linear_num_heads=2, linear_head_dim=8, linear_conv_kernel_dim=4), 0
    )),
}  # fmt: skip


@pytest.mark.parametrize("kind", OF_HUB)
def test_a_layer_is_that_of_transformers(kind: str) -> None:
    """Outputs and all gradients on two sequences of 70 tokens: more than a chunk."""
    sizes, make_hub = OF_HUB[kind]
    with really_float64():
        ours, theirs = make_layer(kind, sizes), make_hub().double()
        for name, parameter in theirs.named_parameters():
            if not name.endswith(("A_log", "dt_bias")):
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.4)
        torch.nn.init.normal_(theirs.get_parameter("dt_bias" if "gated" in kind else "forget_gate.dt_bias"))
        torch.nn.init.normal_(theirs.get_parameter("A_log" if "gated" in kind else "forget_gate.A_log"))
        ours.load_state_dict(theirs.state_dict())
        weights = torch.randn(2, 70, 32, dtype=torch.float64)
        both = []
        for module in (ours, theirs):
            x = torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
            output = module(x)[0] if module is ours else module(x)
            names = [name for name, _ in theirs.named_parameters()]
            grads = torch.autograd.grad((output * weights).sum(), [x, *map(module.get_parameter, names)])
            both.append([output.detach(), *grads])
    assert_equal(*both)


@pytest.mark.parametrize("function", [torch_chunk_gated_delta_rule, chunk_kimi_delta_attention])
def test_the_reference_is_plain_torch(function: Any) -> None:
    """No kernel of the Hub has taken the place of the function that the tests above compare with."""
    import inspect

    assert inspect.getclosurevars(function).nonlocals["is_new_implementation"] is False


@pytest.mark.parametrize("kind", OF_HUB)
def test_pieces_of_a_sequence_equal_the_whole(kind: str) -> None:
    layer, x = make_layer(kind, OF_HUB[kind][0]), torch.randn(3, 50, 32, dtype=torch.float64)
    with torch.no_grad():
        whole = torch.stack([layer(row[None], layout=Segments.single(50))[0][0] for row in x])
        entries = layer._empty(3, x)
        pieces, device = [], torch.device("cpu")
        for count in (21, 28, 1):
            part, x = x[:, :count], x[:, count:]
            runs = Runs(3, (), device) if count == 1 else Runs(0, (count,) * 3, device)
            output, entries = layer._continued(part.flatten(0, 1), runs, entries)
            pieces.append(output.view(3, count, 32))
    assert_equal([torch.cat(pieces, dim=1)], [whole])


def test_sequences_of_one_token_and_of_several_go_on_together() -> None:
    layer, x = make_layer("gated_deltanet", RECURRENT), torch.randn(3, 9, 32, dtype=torch.float64)
    with torch.no_grad():
        _, kept = layer._continued(x[:, :5].flatten(0, 1), Runs(0, (5, 5, 5), x.device), layer._empty(3, x))
        tokens = torch.cat((x[0, 5:6], x[1, 5:9], x[2, 5:7]))
        output, entries = layer._continued(tokens, Runs(1, (4, 2), x.device), kept)
        for row, (count, rows) in enumerate(((6, slice(0, 1)), (9, slice(1, 5)), (7, slice(5, 7)))):
            alone, ends = layer._continued(x[row, :count], Runs(0, (count,), x.device), layer._empty(1, x))
            assert_equal([output[rows], *(entry[row] for entry in entries.values())],
                         [alone[5:], *(entry[0] for entry in ends.values())])


def test_tokens_are_not_guessed_ahead_of_a_state() -> None:
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        make_model("qwen3-next").generate(torch.tensor([[1, 2, 1, 2]]), prompt_lookup_num_tokens=2, max_new_tokens=4)
    assert not make_model("gated")._is_stateful


def test_a_state_is_float32_in_a_model_of_16_bits() -> None:
    layer = make_layer("kimi_delta_attention", KIMI).bfloat16()
    with torch.no_grad():
        x = torch.randn(4, 32).bfloat16()
        output, kept = layer._continued(x, Runs(0, (4,), x.device), layer._empty(1, x))
        _, kept = layer._continued(x[:1], Runs(1, (), x.device), kept)
    assert output.dtype == kept["inputs"].dtype == torch.bfloat16 and kept["state"].dtype == torch.float32
    spec = layer.cache_spec()
    assert spec.sequence_bytes(torch.bfloat16) == 4 * 2 * 8 * 8 + 2 * 3 * 48 and spec.token_numel == 0


ALL = {"layer_types": ["gated_deltanet"] * 2, **RECURRENT}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**ALL, "linear_key_head_dim": None}, "linear_key_head_dim is None, and must be given .* use 128"),
        ({**ALL, "linear_num_key_heads": 0}, "linear_num_key_heads is 0, and must be given"),
        ({**ALL, "linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1, and must be at least 2"),
        ({**ALL, "linear_num_value_heads": 3}, r"linear_num_value_heads is 3, .* of linear_num_key_heads \(2\)"),
        ({**ALL, "layer_types": ["kimi_delta_attention"] * 2}, "linear_num_value_heads is 4, and must equal"),
        ({**ALL, "layer_types": ["kimi_delta_attention"] * 2, **KIMI, "linear_value_head_dim": 6},
         r"linear_value_head_dim is 6, and must equal linear_key_head_dim \(8\)"),
        (RECURRENT, "linear_num_key_heads is 2, but no layer is recurrent; make one so or leave it out"),
    ],
    ids=str,
)  # fmt: skip
def test_impossible_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyConfig(**{**SHAPE, **changes})

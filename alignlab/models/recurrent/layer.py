"""A layer whose sequences keep a state: projections, a short convolution, the gated delta rule, a gated norm.

Shapes: B batch (1 where there is a layout), N tokens, R sequences, H heads, K key size, V value size, C channels of the
convolution, W its width.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from transformers import Cache
from transformers import initialization as init

from alignlab.models.cache_spec import LayerCacheSpec
from alignlab.models.config import PolicyConfig
from alignlab.models.config_rules import require
from alignlab.models.layout import count_call
from alignlab.models.mixing_layer import MixingLayer
from alignlab.models.recurrent.convolution import ShortConvolution
from alignlab.models.recurrent.delta_rule import delta_step, packed_delta_rule
from alignlab.models.recurrent.generation_cache import kept_entries
from alignlab.models.recurrent.runs import Entries, Runs, StateLayout
from alignlab.types import Segments

SIZES = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
"""Fields of a config that a model with recurrent layers must give."""
FIELDS = (*SIZES, "linear_conv_kernel_dim")
"""Fields of a config that mean something for recurrent layers alone."""
_EXAMPLES = dict(zip(FIELDS, (16, 32, 128, 128, 4), strict=True))
_NORM_EPS = 1e-6


class Projected(NamedTuple):
    """The outputs of a layer's projections of its tokens.

    Attributes:
        channels: [N,C], queries, keys and values before the convolution.
        log_decay: [N,H], or [N,H,K], at least float32, not above 0.
        strength: [N,H], at least float32, from 0 to 1.
        gate: [N,H,V], of the output, before its activation.
    """

    channels: Tensor
    log_decay: Tensor
    strength: Tensor
    gate: Tensor


class RecurrentLayer(MixingLayer):
    """A layer that keeps, of each sequence, a state [H,K,V] in float32, and the last W - 1 inputs of its convolution.

    Dtypes: the state, decays, strengths and normed keys are float32 whatever the model's dtype, as a state that is
    rounded at every step drifts by a percent.
    """

    rotary_size = None

    def __init__(self, config: PolicyConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        sizes = [getattr(config, name) for name in SIZES]
        self.num_key_heads, self.num_heads, self.key_size, self.value_size = sizes
        key_channels = self.num_key_heads * self.key_size
        self.channels = (key_channels, key_channels, self.num_heads * self.value_size)
        assert config.linear_conv_kernel_dim is not None
        self.conv1d = ShortConvolution(sum(self.channels), config.linear_conv_kernel_dim)

    @classmethod
    def check_config(cls, config: PolicyConfig) -> None:
        """Raise a ConfigError if a size is missing, or heads do not divide."""
        for name in SIZES:
            size = getattr(config, name)
            require(
                size is not None and size >= 1,
                f"{name} is {size}, and must be given where a layer is recurrent; use {_EXAMPLES[name]}",
            )
        width = config.linear_conv_kernel_dim
        require(
            width is not None and width >= 2,
            f"linear_conv_kernel_dim is {width}, and must be at least 2 where a layer is recurrent; use 4",
        )
        heads, values = config.linear_num_key_heads, config.linear_num_value_heads
        assert heads is not None and values is not None
        require(
            values % heads == 0,
            f"linear_num_value_heads is {values}, and must be a multiple of linear_num_key_heads ({heads}); use "
            f"{heads}",
        )

    @classmethod
    def make_mask(cls, config: PolicyConfig, **arguments: Any) -> Any:
        """Return which tokens are not padding, [B, tokens], or None: the layer hides no token from another."""
        return arguments["attention_mask"]

    def cache_spec(self) -> LayerCacheSpec:
        """Return what the layer keeps of a sequence."""
        kept = {
            "state": (self.num_heads, self.key_size, self.value_size),
            "inputs": (self.conv1d.kept, sum(self.channels)),
        }
        return LayerCacheSpec(per_sequence=kept, float32_entries=frozenset({"state"}))

    @abstractmethod
    def project(self, hidden_states: Tensor) -> Projected:
        """Return what the projections compute of hidden states [N, hidden size]."""

    @abstractmethod
    def project_output(self, output: Tensor, gate: Tensor) -> Tensor:
        """Return hidden states [N, hidden size] from outputs and gates [N,H,V]."""

    def forward(
        self, hidden_states: Tensor, position_embeddings: None = None, attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None, *, layout: Segments | StateLayout | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Return the layer's output [B,N,hidden size].

        Args:
            attention_mask: [B, tokens], which are not padding; read only where there is no layout.
        """
        if layout is None:
            return self._padded(hidden_states, attention_mask, past_key_values), None
        count_call()
        if isinstance(layout, Segments):
            projected = self.project(hidden_states[0])
            output, _ = self._over_segments(projected, layout)
            return self.project_output(output, projected.gate)[None], None
        output, entries = self._continued(hidden_states[0], layout.runs, layout.states(self.layer_idx))
        layout.keep_states(self.layer_idx, entries)
        return output[None], None

    def _padded(self, hidden_states: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """Return the output of a batch whose sequences begin together, or go on from a cache.

        Padding is zero: it writes nothing into a state that is zero before the first token, and what it does to a state
        after the last one is not read.
        """
        count, length, _ = hidden_states.shape
        if mask is not None:
            hidden_states = hidden_states * mask[:, -length:, None].to(hidden_states.dtype)
        num_single, lengths = (count, ()) if length == 1 else (0, (length,) * count)
        runs = Runs(num_single, lengths, hidden_states.device)
        kept = kept_entries(cache, self.layer_idx)
        entries = kept.entries if kept is not None and kept.entries else self._empty(count, hidden_states)
        output, entries = self._continued(hidden_states.flatten(0, 1), runs, entries)
        if kept is not None:
            kept.keep(entries, length)
        return output.view(hidden_states.shape)

    def _empty(self, count: int, like: Tensor) -> Entries:
        """Return what sequences keep before their first token."""
        return {
            name: like.new_zeros(count, *shape, dtype=spec_dtype)
            for name, shape, spec_dtype in self.cache_spec().sequence_entries(like.dtype)
        }

    def _continued(self, hidden_states: Tensor, runs: Runs, start: Entries) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the output [N,hidden size] of sequences that go on, and what they keep then.

        Args:
            hidden_states: [N,hidden size].
            start: what they kept before.
        """
        projected = self.project(hidden_states)
        parts = []
        if runs.num_single:
            tokens = Projected(*runs.single(*projected))
            parts.append(self._over_tokens(tokens, *runs.single(start["inputs"], start["state"])))
        if runs.lengths:
            tokens = Projected(*runs.longer(*projected))
            parts.append(self._over_segments(tokens, runs.segments, *runs.longer(start["inputs"], start["state"])))
        output = torch.cat([output for output, _ in parts])
        entries = {name: torch.cat([kept[name] for _, kept in parts]) for name in start}
        return self.project_output(output, projected.gate), entries

    def _over_segments(
        self, projected: Projected, segments: Segments, inputs: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return outputs [N,H,V], and what each segment keeps at its end; roots begin from what is given, or from 0."""
        channels, inputs = self.conv1d(projected.channels, segments, inputs)
        output, state = packed_delta_rule(
            *self._heads(channels), projected.log_decay, projected.strength, segments, start=state
        )
        return output.to(channels.dtype), {"state": state, "inputs": inputs}

    def _over_tokens(self, projected: Projected, inputs: Tensor, state: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return outputs [R,H,V] of one more token of each sequence, and what each keeps then."""
        channels, inputs = self.conv1d(projected.channels, None, inputs)
        output, state = delta_step(state, *self._heads(channels), projected.log_decay, projected.strength)
        return output.to(channels.dtype), {"state": state, "inputs": inputs}

    def _heads(self, channels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, scaled, and keys [N,H,K], of L2 norm 1, and values [N,H,V], in float32."""
        exact = torch.promote_types(channels.dtype, torch.float32)
        query, key, value = (
            part.view(len(channels), -1, size).to(exact)
            for part, size in zip(
                channels.split(self.channels, dim=-1), (self.key_size, self.key_size, self.value_size), strict=True
            )
        )
        shared = self.num_heads // self.num_key_heads
        query, key = (
            (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _NORM_EPS)).repeat_interleave(shared, dim=1)
            for x in (query, key)
        )
        return query * self.key_size**-0.5, key, value


def log_decay(pre_activation: Tensor, bias: Tensor, log_rate: Tensor) -> Tensor:
    """Return -e^log_rate softplus(pre_activation + bias), in at least float32; biases and rates are broadcast."""
    exact = torch.promote_types(pre_activation.dtype, torch.float32)
    return -log_rate.to(exact).exp() * softplus(pre_activation.to(exact) + bias.to(exact))


class GatedNorm(nn.Module):
    """RMSNorm of each head's output, times the activation of its gate; float32 inside, rounded once.

    Args:
        size: of a head, V.
        eps: of the norm.
        activation: of the gate.
    """

    def __init__(self, size: int, eps: float, activation: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self._activation = activation

    def forward(self, output: Tensor, gate: Tensor) -> Tensor:
        exact = torch.promote_types(output.dtype, torch.float32)
        x = output.to(exact)
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight.to(exact)
        return (normed * self._activation(gate.to(exact))).to(output.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


@torch.no_grad()
def draw_decay(log_rate: Tensor, bias: Tensor, most: float = 16.0) -> None:
    """Draw rates between 1 and `most`, and biases whose softplus is between 0.001 and 0.1, evenly in their logarithms.

    As Mamba 2 (arXiv:2405.21060) and the layers after it begin.
    """
    init.copy_(log_rate, torch.empty_like(log_rate, dtype=torch.float32).uniform_(1.0, most).log())
    step = torch.empty_like(bias, dtype=torch.float32).uniform_(-6.907755, -2.302585).exp().clamp_min(1e-4)
    init.copy_(bias, step + torch.log(-torch.expm1(-step)))

"""Gated DeltaNet: the delta rule with one decay a head.

Shapes: N tokens, H value heads, HK key heads, K and V sizes of their heads.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from alignlab.models.config import PolicyConfig
from alignlab.models.recurrent.layer import GatedNorm, Projected, RecurrentLayer, draw_decay, log_decay


class GatedDeltaNet(RecurrentLayer):
    """Gated DeltaNet with a projection for each of its inputs, as in Qwen3.5; names of weights are those there.

    Reference: Yang et al. (2024), arXiv:2412.06464.
    """

    name_in_layer: ClassVar[str] = "linear_attn"

    def __init__(self, config: PolicyConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        values = self.num_heads * self.value_size
        self.make_projections(config.hidden_size, values)
        self.dt_bias = nn.Parameter(torch.ones(self.num_heads))
        self.A_log = nn.Parameter(torch.zeros(self.num_heads))
        self.norm = GatedNorm(self.value_size, config.rms_norm_eps, silu)
        self.out_proj = nn.Linear(values, config.hidden_size, bias=False)

    def make_projections(self, hidden_size: int, value_channels: int) -> None:
        """Make the layers that `projections` reads."""
        self.in_proj_qkv = nn.Linear(hidden_size, sum(self.channels), bias=False)
        self.in_proj_z = nn.Linear(hidden_size, value_channels, bias=False)
        self.in_proj_b = nn.Linear(hidden_size, self.num_heads, bias=False)
        self.in_proj_a = nn.Linear(hidden_size, self.num_heads, bias=False)

    def initialize(self) -> None:
        """Draw rates and biases of the decay."""
        draw_decay(self.A_log, self.dt_bias)

    def projections(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return channels [N,C], gates [N,H*V], and what strengths and decays are activated from, [N,H] each."""
        return (
            self.in_proj_qkv(hidden_states), self.in_proj_z(hidden_states), self.in_proj_b(hidden_states),
            self.in_proj_a(hidden_states),
        )

    def project(self, hidden_states: Tensor) -> Projected:
        """Return what the projections compute of hidden states [N, hidden size]."""
        channels, gate, strength, decay = self.projections(hidden_states)
        exact = torch.promote_types(hidden_states.dtype, torch.float32)
        return Projected(
            channels, log_decay(decay, self.dt_bias, self.A_log), strength.to(exact).sigmoid(),
            gate.view(len(gate), self.num_heads, -1),
        )

    def project_output(self, output: Tensor, gate: Tensor) -> Tensor:
        """Return hidden states [N, hidden size] from outputs and gates [N,H,V]."""
        return self.out_proj(self.norm(output, gate).flatten(1))


class FusedGatedDeltaNet(GatedDeltaNet):
    """Gated DeltaNet with two fused projections, key head by key head, as in Qwen3-Next.

    Rows of `in_proj_qkvz` for a key head: its query, its key, the values and the gates of the value heads that share
    it; of `in_proj_ba`: their strengths and their decays.
    """

    def make_projections(self, hidden_size: int, value_channels: int) -> None:
        """Make the layers that `projections` reads."""
        self.in_proj_qkvz = nn.Linear(hidden_size, sum(self.channels) + value_channels, bias=False)
        self.in_proj_ba = nn.Linear(hidden_size, 2 * self.num_heads, bias=False)

    def projections(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return channels [N,C], gates [N,H*V], and what strengths and decays are activated from, [N,H] each."""
        count, shared = len(hidden_states), self.num_heads // self.num_key_heads
        values = shared * self.value_size
        by_head = self.in_proj_qkvz(hidden_states).view(count, self.num_key_heads, -1)
        query, key, value, gate = by_head.split([self.key_size, self.key_size, values, values], dim=-1)
        strength, decay = self.in_proj_ba(hidden_states).view(count, self.num_key_heads, -1).split(shared, dim=-1)
        channels = torch.cat([part.flatten(1) for part in (query, key, value)], dim=-1)
        return channels, gate.flatten(1), strength.flatten(1), decay.flatten(1)

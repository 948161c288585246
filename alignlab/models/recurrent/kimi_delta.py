"""Kimi Delta Attention: the delta rule with a decay for each channel of a head's keys.

Shapes: N tokens, H heads, D size of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alignlab.models.config import PolicyConfig
from alignlab.models.config_rules import require
from alignlab.models.recurrent.layer import GatedNorm, Projected, RecurrentLayer, draw_decay, log_decay


class ForgetGate(nn.Module):
    """Log decays of each channel: low-rank projections, and a rate of each head."""

    def __init__(self, hidden_size: int, num_heads: int, head_size: int) -> None:
        super().__init__()
        self.f_a_proj = nn.Linear(hidden_size, head_size, bias=False)
        self.f_b_proj = nn.Linear(head_size, num_heads * head_size, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(num_heads * head_size))
        self.A_log = nn.Parameter(torch.zeros(1, 1, num_heads, 1))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map [N, hidden size] -> [N,H,D], not above 0."""
        heads = (self.A_log.shape[2], -1)
        decay = self.f_b_proj(self.f_a_proj(hidden_states)).unflatten(-1, heads)
        return log_decay(decay, self.dt_bias.view(heads), self.A_log[0])


class KimiDeltaAttention(RecurrentLayer):
    """Kimi Delta Attention; names of weights are those of Kimi Linear in `transformers`.

    Reference: Kimi Team (2025), arXiv:2510.26692.
    """

    def __init__(self, config: PolicyConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        hidden, size, channels = config.hidden_size, self.key_size, self.num_heads * self.key_size
        self.q_proj = nn.Linear(hidden, channels, bias=False)
        self.k_proj = nn.Linear(hidden, channels, bias=False)
        self.v_proj = nn.Linear(hidden, channels, bias=False)
        self.forget_gate = ForgetGate(hidden, self.num_heads, size)
        self.b_proj = nn.Linear(hidden, self.num_heads, bias=False)
        self.g_a_proj = nn.Linear(hidden, size, bias=False)
        self.g_b_proj = nn.Linear(size, channels, bias=False)
        self.o_norm = GatedNorm(size, config.rms_norm_eps, torch.sigmoid)
        self.o_proj = nn.Linear(channels, hidden, bias=False)

    @classmethod
    def check_config(cls, config: PolicyConfig) -> None:
        """Raise a ConfigError if a size is missing, or keys and values differ in heads or size."""
        super().check_config(config)
        for key, value in (
            ("linear_num_key_heads", "linear_num_value_heads"), ("linear_key_head_dim", "linear_value_head_dim")
        ):
            sizes = getattr(config, key), getattr(config, value)
            require(
                sizes[0] == sizes[1],
                f"{value} is {sizes[1]}, and must equal {key} ({sizes[0]}) where a layer is kimi_delta_attention; use "
                f"{sizes[0]}",
            )

    def initialize(self) -> None:
        """Draw rates and biases of the decay."""
        draw_decay(self.forget_gate.A_log, self.forget_gate.dt_bias)

    def project(self, hidden_states: Tensor) -> Projected:
        """Return what the projections compute of hidden states [N, hidden size]."""
        channels = torch.cat([proj(hidden_states) for proj in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
        exact = torch.promote_types(hidden_states.dtype, torch.float32)
        gate = self.g_b_proj(self.g_a_proj(hidden_states)).view(len(hidden_states), self.num_heads, -1)
        strength = self.b_proj(hidden_states).to(exact).sigmoid()
        return Projected(channels, self.forget_gate(hidden_states), strength, gate)

    def project_output(self, output: Tensor, gate: Tensor) -> Tensor:
        """Return hidden states [N, hidden size] from outputs and gates [N,H,D]."""
        return self.o_proj(self.o_norm(output, gate).flatten(1))

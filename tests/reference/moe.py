"""A mixture of experts, one token and one expert at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def route(
    logits: Tensor, num_chosen: int, *, scoring: str, normalise: bool, scale: float, bias: Tensor | None = None,
    replay: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(choices, gates) [N, K] from router logits [N, E]; `replay` [N, K], -1 for a token that chooses itself."""
    choices, gates = [], []
    for token, row in enumerate(logits):
        scores = torch.softmax(row, 0) if scoring == "softmax" else torch.sigmoid(row)
        ranked = scores if bias is None else scores + bias
        best = sorted(range(len(row)), key=lambda expert: -ranked[expert].item())[:num_chosen]
        if replay is not None and replay[token, 0] >= 0:
            best = replay[token].tolist()
        picked = torch.stack([scores[expert] for expert in best])
        gates.append(scale * (picked / picked.sum() if normalise else picked))
        choices.append(torch.tensor(best))
    return torch.stack(choices), torch.stack(gates)


def mixture(hidden: Tensor, gate_up: Tensor, down: Tensor, choices: Tensor, gates: Tensor) -> Tensor:
    """Sum over each token's experts of gate * down(silu(gate_proj(x)) * up_proj(x))."""
    outputs = []
    for token, x in enumerate(hidden):
        total = torch.zeros_like(x)
        for expert, gate in zip(choices[token].tolist(), gates[token], strict=True):
            gated, up = (gate_up[expert] @ x).chunk(2)
            total = total + gate * (down[expert] @ (F.silu(gated) * up))
        outputs.append(total)
    return torch.stack(outputs)

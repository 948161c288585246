"""The rotation of a layer's keys by their positions: found by measuring, undone, and applied again.

Shapes: N tokens, K kv heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignlab.errors import ConfigError
from alignlab.models.config import PolicyConfig
from alignlab.models.decoder import causal_lm, hidden_states, num_positions
from alignlab.models.evaluation_mode import evaluation_mode
from alignlab.models.packed_attention import packed_attention
from alignlab.types import Segments

_POSITIONS = (0, 1, 7)
_TOKEN = 1
_CHANGING = ("dynamic", "longrope")
"""Rotations of `transformers` that change with the longest sequence of a batch."""


class KeyRotation(NamedTuple):
    """A rotation of the first numbers of a head, the two halves of which are pairs.

    Attributes:
        frequencies: [size / 2] float32, radians a position; None where keys have no positions.
    """

    frequencies: Tensor | None

    def rotate(self, keys: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        """Return keys [..., D], at least float32, turned by their positions, or back.

            (a, b) -> (a cos - b sin, b cos + a sin)

        Args:
            positions: broadcasts to the keys without D.
        """
        if self.frequencies is None:
            return keys
        frequencies = self.frequencies.to(keys.device)
        half = len(frequencies)
        angles = positions[..., None].float() * frequencies
        cos, sin = angles.cos(), angles.sin() * (-1 if back else 1)
        a, b, rest = keys.split([half, half, keys.shape[-1] - 2 * half], dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


class KeyRecorder:
    """A replay that approximates nothing and notes each layer's keys [1,K,N,D]."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, segments: Segments, **options: object
    ) -> Tensor:
        """Return packed attention."""
        self.keys[layer_idx] = key
        return packed_attention(query, key, value, segments, **options)  # type: ignore[arg-type]


@torch.no_grad()
def key_rotations(model: nn.Module) -> dict[int, KeyRotation]:
    """Return the rotation of each layer's keys.

    A token that sees itself alone has the same state at every position, and so the same key but for the rotation. The
    frequencies of the model's rotary embeddings are tried, and those taken that turn the keys back best.

    Raises:
        ConfigError: a layer rotates its keys in another way.
    """
    lm = causal_lm(model)
    positions = [position for position in _POSITIONS if position < num_positions(model)]
    candidates = [KeyRotation(None), *(KeyRotation(frequencies) for frequencies in _frequencies(lm))]
    rotations = {}
    for layer_idx, keys in _keys_of_one_state(model, positions).items():
        best, error = _best_rotation(candidates, keys, torch.tensor(positions, device=keys.device))
        if _changes_with_length(lm) or error > max(16 * torch.finfo(keys.dtype).eps, 1e-4):
            raise ConfigError(
                f"rollout.kv_cache is low_rank, which undoes the rotation of keys, and layer {layer_idx} of "
                f"{type(lm).__name__} rotates them in a way that it does not know; use another kv_cache, such as "
                "{type: int8}"
            )
        rotations[layer_idx] = best
    return rotations


def _keys_of_one_state(model: nn.Module, positions: Sequence[int]) -> dict[int, Tensor]:
    """Return each layer's keys [1,K,N,D] of one token that stands alone, at each of N positions."""
    lm = causal_lm(model)
    device, count = next(lm.parameters()).device, len(positions)
    segments = Segments((1,) * count, (-1,) * count, tuple(range(count)), tuple(range(count)), device)
    tokens, recorder = torch.full((count,), _TOKEN, device=device), KeyRecorder()
    with evaluation_mode(lm.modules()):
        hidden_states(model, tokens, torch.tensor(positions, device=device), segments, kv_replay=recorder)
    return recorder.keys


def _best_rotation(
    candidates: Sequence[KeyRotation], keys: Tensor, positions: Tensor
) -> tuple[KeyRotation, float]:
    """Return the candidate that turns keys [1,K,N,D] of one state back best, with its error."""
    fitting = [r for r in candidates if r.frequencies is None or 2 * len(r.frequencies) <= keys.shape[-1]]
    errors = [_error(rotation, keys, positions) for rotation in fitting]
    best = min(range(len(fitting)), key=errors.__getitem__)
    return fitting[best], errors[best]


def _changes_with_length(lm: PreTrainedModel) -> bool:
    """Return whether `transformers` changes a model's frequencies by the length of what it reads."""
    rope = getattr(lm.config, "rope_parameters", None) or {}
    kind = rope.get("rope_type") if isinstance(rope, dict) else None
    return kind in _CHANGING and not isinstance(lm.config, PolicyConfig)


def _frequencies(lm: nn.Module) -> list[Tensor]:
    """Return the frequencies of a model's rotary embeddings, each once."""
    return [
        buffer.float().clone() for module in lm.modules() for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq")
    ]


def _error(rotation: KeyRotation, keys: Tensor, positions: Tensor) -> float:
    """Return how far keys [1,K,N,D] of one state, turned back, are from the first, as a part of the largest number."""
    turned = rotation.rotate(keys.to(torch.promote_types(keys.dtype, torch.float32)), positions, back=True)
    return float((turned - turned[:, :, :1]).abs().max() / turned.abs().max().clamp_min(1e-30))

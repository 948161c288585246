"""Text that a model is measured on before it is made smaller, and what its layers read there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignlab.models.decoder import hidden_states
from alignlab.models.evaluation_mode import evaluation_mode
from alignlab.types import Segments


class CalibrationText(NamedTuple):
    """Packed sequences of text.

    Attributes:
        tokens: [N] ids.
        segments: how they divide into sequences.
    """

    tokens: Tensor
    segments: Segments


@torch.no_grad()
def read(model: PreTrainedModel, text: CalibrationText) -> None:
    """Compute a model on a text, for what hooks see of it; nothing is drawn at random."""
    with evaluation_mode(model.modules()):
        hidden_states(model, text.tokens, text.segments.position_ids, text.segments)


@contextmanager
def square_sums(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Add up, in the block, the squares of what layers read: name -> [inputs], float32, over all tokens."""
    sums: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, layer in layers.items():

            def add(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                squares = args[0].detach().float().flatten(0, -2).square().sum(0)
                sums[name] = sums[name] + squares if name in sums else squares

            hooks.callback(layer.register_forward_pre_hook(add).remove)
        yield sums

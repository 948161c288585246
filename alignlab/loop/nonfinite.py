"""The error that names what is not finite in an update: the first weight's gradient, and sequences of the packs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignlab.errors import NumericsError
from alignlab.models.pieces import held
from alignlab.types import Experience


def gradient_error(
    trained: Mapping[str, nn.Parameter], packs: Sequence[Experience], outputs: Iterable[Any]
) -> NumericsError:
    """Return the error of an update whose gradient is not finite.

    Args:
        trained: parameters in training, by name, with their gradients.
        packs: of the update.
        outputs: of the module in training, for each pack.
    """
    gradients = ((name, held(p.grad)) for name, p in trained.items() if p.grad is not None)
    bad = [name for name, gradient in gradients if not gradient.isfinite().all()]
    sequences = [
        f"sequence {int(pack.segments.sequence_of_token[i])} of pack {number}"
        for number, (pack, output) in enumerate(zip(packs, outputs, strict=True))
        for i in _tokens_not_finite(output).nonzero()[:1].flatten().tolist()
    ]
    return NumericsError(
        f"the gradient is not finite: first in {bad[0] if bad else 'its norm'} ({len(bad)} tensors), "
        f"outputs not finite in {sequences or 'no sequence'}; lower optim.learning_rate, or set "
        "optim.on_nonfinite: skip"
    )


def _tokens_not_finite(output: Sequence[Tensor | None]) -> Tensor:
    """Return a mask [N] of the tokens at which a number of the output is not finite."""
    per_token = [values for values in output if values is not None and values.is_floating_point() and values.dim() == 1]
    return torch.stack([~values.isfinite() for values in per_token]).any(dim=0)

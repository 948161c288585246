"""A check of weights and scores for infinities and nan, before they are trained on or saved."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from alignlab.errors import NumericsError

TRAIN_SLOWER = "lower optim.learning_rate or optim.max_grad_norm, and go on from the last checkpoint by --resume"
TAKE_ANOTHER = "take another checkpoint, or load it in float32"


def check_finite(tensors: Iterable[tuple[str, Tensor]], description: str, *, fix: str = TRAIN_SLOWER) -> None:
    """Raise if a number in any tensor is not finite. Costs one sum of each tensor and one wait for the device.

    Args:
        tensors: (name, tensor) pairs; tensors without floating-point numbers, and those of an empty model, are
            skipped.
        description: of the tensors, for the message, such as "the weights after step 3".
        fix: the advice in the message.

    Raises:
        NumericsError: naming the first such tensor.
    """
    named = [
        (name, tensor.detach())
        for name, tensor in tensors
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta
    ]
    if not named:
        return
    sums = [tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).double() for _, tensor in named]
    are_finite = torch.stack([total.to(sums[0].device) for total in sums]).isfinite().tolist()
    suspects = [pair for pair, is_finite in zip(named, are_finite, strict=True) if not is_finite]
    # A sum of numbers that are finite may itself be too large.
    bad = [(name, tensor) for name, tensor in suspects if not tensor.isfinite().all()]
    if bad:
        name, tensor = bad[0]
        count = int((~tensor.isfinite()).sum())
        raise NumericsError(
            f"{description} must be finite, and {count} of {tensor.numel()} numbers of {name} are not"
            f"{f', and of {len(bad) - 1} more' if len(bad) > 1 else ''}; {fix}"
        )

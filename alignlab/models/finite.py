"""Numbers that are not finite, found in weights and scores before anything is learnt from them or kept as good."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from alignlab.errors import NumericsError

TRAIN_SLOWER = "lower learning_rate or max_grad_norm, and go on from the last checkpoint by --resume"
TAKE_ANOTHER = "take another checkpoint, or load it in float32"


def check_finite(tensors: Iterable[tuple[str, Tensor]], what: str, *, fix: str = TRAIN_SLOWER) -> None:
    """Raise if a number of some tensors is not finite. Costs one sum of each and one wait for the device.

    Args:
        tensors: with their names; those that hold no floating-point numbers are passed over.
        what: they are, for the message, such as "the weights after step 3".
        fix: what to do, for the message.

    Raises:
        NumericsError: naming the first such tensor.
    """
    named = [(name, tensor.detach()) for name, tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    if not named:
        return
    sums = [tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).double().cpu() for _, tensor in named]
    suspects = [pair for pair, total in zip(named, sums, strict=True) if not total.isfinite()]
    # A sum of numbers that are finite may itself be too large.
    bad = [(name, tensor) for name, tensor in suspects if not tensor.isfinite().all()]
    if bad:
        name, tensor = bad[0]
        count = int((~tensor.isfinite()).sum())
        raise NumericsError(
            f"{what} must be finite, and {count} of {tensor.numel()} numbers of {name} are not"
            f"{f', and of {len(bad) - 1} more' if len(bad) > 1 else ''}; {fix}"
        )

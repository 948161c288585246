"""The factor on a float16 loss, under which its gradients are neither too small nor too large for float16.

Micikevicius et al. (2018), arXiv:1710.03740, Sec. 3.2. A step whose gradients overflow is computed again under half the
factor, so that none is lost; other implementations skip it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

FIRST = 2.0**16
GROWS_AFTER = 1000
"""Updates without an overflow after which the factor is doubled."""


class LossScale:
    """The factor of one module in training; 1, and constant, where it is not computed in float16.

    Args:
        dtype: of the module's products.

    Attributes:
        factor: on the loss of the next backward pass.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.is_needed = dtype == torch.float16
        self.factor = FIRST if self.is_needed else 1.0
        self._last_finite, self._num_finite = self.factor, 0

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the factor."""
        if self.factor == 1.0:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(self.factor)

    def shrink(self) -> bool:
        """Halve the factor after an overflow.

        Returns:
            False at 1, where the gradient itself is not finite, and the scale is what it was before.
        """
        if self.factor <= 1.0:
            self.factor = self._last_finite
            return False
        self.factor, self._num_finite = self.factor / 2, 0
        return True

    def finite(self) -> None:
        """Count an update whose gradients were finite, and double the factor once there were many in a row."""
        if not self.is_needed:
            return
        self._last_finite, self._num_finite = self.factor, self._num_finite + 1
        if self._num_finite == GROWS_AFTER:
            self.factor, self._num_finite = self.factor * 2, 0

    def state(self) -> dict[str, Any]:
        """Return the factor and the count, as JSON."""
        return {"factor": self.factor, "num_finite": self._num_finite}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back the output of `state`."""
        self.factor, self._num_finite = state["factor"], state["num_finite"]
        self._last_finite = self.factor

"""The weights of the native step: packed copies of the policy's, adapters merged in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from alignlab.models.decoder import output_head
from alignlab.rollout.embedded.native.binding import Kernels
from alignlab.rollout.embedded.native.model import NativeModel
from alignlab.rollout.embedded.rounding import Rounding
from alignlab.rollout.embedded.weights import EngineWeights


class NativeWeights(EngineWeights):
    """Packs the policy's weights for the kernels when they are first needed, and frees them while the engine rests.

    Args:
        model: the policy, which `coverage` has checked.
        kernels: for the dtype of its weights.
        merge, rounding: as in `EngineWeights`.
    """

    def __init__(
        self, model: nn.Module, kernels: Kernels, *, merge: bool | None, rounding: Rounding | None = None
    ) -> None:
        self._kernels = kernels
        self._packed: NativeModel | None = None
        super().__init__(model, merge=merge, pack=False, rounding=rounding)

    @property
    def packed(self) -> NativeModel:
        """The present weights as the kernels read them."""
        if self._packed is None:
            self._packed = NativeModel(self._model, self._kernels, self.rounding)
            self.rounding_s = self._packed.rounding_s
        return self._packed

    def refresh(self) -> None:
        """Take the policy's present weights, which are packed before the next step."""
        self.release()
        self._stamp = self._present()

    def release(self) -> None:
        """Free the packed weights; the next step packs them again."""
        self._packed = None

    def rest(self) -> None:
        """Free the packed weights until the next call."""
        self.release()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Have the weights packed within the context; the model itself does not run."""
        assert self.packed is not None
        yield

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [B,V] float32 of hidden states [B, hidden size]."""
        logits = self._kernels.product(hidden.contiguous(), self.packed.head)
        softcap = output_head(self._model)[2]
        return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)

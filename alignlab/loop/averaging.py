"""The exponential moving average of the weights in training, in float32: less noisy than the weights themselves.

Polyak & Juditsky (1992), Acceleration of Stochastic Approximation by Averaging; with exponential weights:

    average_0 = weights_0
    average_t = decay * average_{t-1} + (1 - decay) * weights_t        after the t-th optimizer update

Under DDP every rank has all weights, and computes the same average. Weights in 16 bits are averaged by their float32
copies, see `master_weights`. Buffers, such as the biases that balance a mixture's experts, are not averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from alignlab.config.averaging import AveragedConfig, EMASettings
from alignlab.config.trainer import TrainerConfig
from alignlab.errors import CheckpointError
from alignlab.models.pieces import Held, mark_written
from alignlab.runs.checkpoint import MASTER
from alignlab.runs.tensor_groups import load_held, shape_of

if TYPE_CHECKING:
    from alignlab.loop.learner import Learner

GROUP = "average"
"""Name of the average among the tensors of a checkpoint."""
Use = Literal["evaluate", "export"]
"""An evaluation between steps; or the run's model, with the evaluation of it."""


class WeightAverage:
    """The average of a learner's weights in training, of an adapter those of the adapter alone.

    Args:
        trained: the parameters in training, by name; each whole on this rank.
        optimizer: of these parameters; the average follows each of its steps.
        settings: of the average.

    Attributes:
        tensors: the average, by name, in float32 (float64 for float64).
        set_aside: the weights in training while the average is in their place, by name; empty otherwise.
    """

    def __init__(
        self, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, settings: EMASettings
    ) -> None:
        self.settings, self._trained, self._optimizer = settings, dict(trained), optimizer
        self.tensors = {name: self._exact(p).to(_dtype(p), copy=True) for name, p in self._trained.items()}
        self.set_aside: dict[str, Tensor] = {}
        optimizer.register_step_post_hook(self._follow)

    @property
    def num_bytes(self) -> int:
        """Size of the average."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @torch.no_grad()
    def _follow(self, *_: Any) -> None:
        """Take the weights after a step of the optimizer into the average."""
        for name, parameter in self._trained.items():
            average = self.tensors[name]
            average.lerp_(self._exact(parameter).to(average.dtype), 1.0 - self.settings.decay)

    def _exact(self, parameter: nn.Parameter) -> Tensor:
        """Return a weight, or the optimizer's float32 copy of one in 16 bits."""
        exact: Tensor = self._optimizer.state.get(parameter, {}).get(MASTER, parameter)
        return exact.detach()

    def groups(self, policy: Mapping[str, Held]) -> dict[str, dict[str, Held]]:
        """Return the groups of a checkpoint that are the average's, or change because it is in place.

        Args:
            policy: the group of the weights, as they are at present.
        """
        return {"policy": {**policy, **self.set_aside}, GROUP: dict(self.tensors)}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average in the place of the weights within this context, rounded to their dtype."""
        self.set_aside = {name: parameter.detach().clone() for name, parameter in self._trained.items()}
        try:
            self._write(self.tensors)
            yield
        finally:
            self._write(self.set_aside)
            self.set_aside = {}

    @torch.no_grad()
    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self._trained.items():
            parameter.copy_(tensors[name])
        mark_written(self._trained.values())

    def load(self, stored: Mapping[str, Tensor] | None) -> None:
        """Go on from the average of a checkpoint; from none, of a run without one until now, begin at the weights.

        Raises:
            CheckpointError: the average is of other weights.
        """
        for name, parameter in self._trained.items():
            average = self.tensors[name]
            if stored is None:
                average.copy_(self._exact(parameter))
            elif name not in stored or shape_of(stored, name) != average.shape:
                raise CheckpointError(
                    f"the checkpoint's average of the weights has no {name} of shape {tuple(average.shape)}; resume "
                    "with the model and LoRA settings that the run was started with"
                )
            else:
                load_held(stored, name, average)


def make_average(
    trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, config: TrainerConfig
) -> WeightAverage | None:
    """Return the average of what a learner trains; None where its config asks for none."""
    settings = config.ema if isinstance(config, AveragedConfig) else None
    return None if settings is None else WeightAverage(trained, optimizer, settings)


def average_for(learner: Learner, use: Use) -> WeightAverage | None:
    """Return the average of a learner's weights where its settings want it for a use; otherwise None."""
    average = learner.average
    if average is None:
        return None
    wants: dict[Use, bool] = {"evaluate": average.settings.evaluate, "export": average.settings.export}
    return average if wants[use] else None


def averaged(learner: Learner, use: Use) -> AbstractContextManager[None]:
    """Return a context in which a learner's model has the average of its weights, if that is wanted for the use."""
    average = average_for(learner, use)
    return nullcontext() if average is None else average.in_place()


def _dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)

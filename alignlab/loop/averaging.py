"""The exponential moving average of the weights in training, in float32: less noisy than the weights themselves.

Polyak & Juditsky (1992), Acceleration of Stochastic Approximation by Averaging; with exponential weights:

    average_0 = weights_0
    average_t = decay * average_{t-1} + (1 - decay) * weights_t        after the t-th optimizer update

Under DDP every rank has all weights, and computes the same average; under FSDP2 each averages the rows that it holds.
Weights in 16 bits are averaged by their float32 copies, see `master_weights` and `exact_weights`. Buffers, such as the
biases that balance a mixture's experts, are not averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from alignlab.config.averaging import AveragedConfig, EMASettings
from alignlab.config.trainer import TrainerConfig
from alignlab.errors import CheckpointError
from alignlab.models.exact_weights import held_part
from alignlab.models.pieces import Held, Piece, held, mark_written, piece_of, whole_shape
from alignlab.runs.checkpoint import MASTER
from alignlab.runs.tensor_groups import elements_of, load_held, shape_of

if TYPE_CHECKING:
    from alignlab.loop.learner import Learner

GROUP = "average"
"""Name of the average among the tensors of a checkpoint."""
Use = Literal["evaluate", "export"]
"""An evaluation between steps; or the run's model, with the evaluation of it."""


class WeightAverage:
    """The average of a learner's weights in training, of an adapter those of the adapter alone.

    Args:
        trained: the parameters in training, by name; whole on this rank, or spread over ranks by FSDP2.
        optimizer: of these parameters; the average follows each of its steps.
        settings: of the average.

    Attributes:
        tensors: what this rank holds of the average, by name, in float32 (float64 for float64).
        set_aside: what this rank holds of the weights in training while the average is in their place, by name, as a
            checkpoint has them; empty otherwise.
    """

    def __init__(
        self, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, settings: EMASettings
    ) -> None:
        self.settings, self._trained, self._optimizer = settings, dict(trained), optimizer
        self.tensors: dict[str, Held] = {}
        for name, parameter in self._trained.items():
            values, piece = self._exact(parameter).to(_dtype(parameter), copy=True), piece_of(parameter)
            self.tensors[name] = values if piece is None else replace(piece, values=values)
        self.set_aside: dict[str, Held] = {}
        optimizer.register_step_post_hook(self._follow)

    @property
    def num_bytes(self) -> int:
        """Size of the average."""
        return sum(held(tensor).numel() * held(tensor).element_size() for tensor in self.tensors.values())

    @torch.no_grad()
    def _follow(self, *_: Any) -> None:
        """Take the weights after a step of the optimizer into the average."""
        for name, parameter in self._trained.items():
            average = held(self.tensors[name])
            average.lerp_(self._exact(parameter).to(average.dtype), 1.0 - self.settings.decay)

    def _exact(self, parameter: nn.Parameter) -> Tensor:
        """Return what this rank holds of a weight, or of the optimizer's float32 copy of one in 16 bits."""
        exact: Tensor = self._optimizer.state.get(parameter, {}).get(MASTER, parameter)
        return held(exact).detach()

    def groups(self, policy: Mapping[str, Held]) -> dict[str, dict[str, Held]]:
        """Return the groups of a checkpoint that are the average's, or change because it is in place.

        Args:
            policy: the group of the weights, as they are at present.
        """
        return {"policy": {**policy, **self.set_aside}, GROUP: dict(self.tensors)}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average in the place of the weights within this context, rounded to their dtype."""
        weights = {name: held(parameter).detach().clone() for name, parameter in self._trained.items()}
        self.set_aside = {name: held_part(parameter).clone() for name, parameter in self._trained.items()}
        try:
            self._write({name: held(average) for name, average in self.tensors.items()})
            yield
        finally:
            self._write(weights)
            self.set_aside = {}

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._trained.items():
            held(parameter).copy_(values[name])
        mark_written(self._trained.values())

    def load(self, stored: Mapping[str, Tensor] | None) -> None:
        """Go on from the average of a checkpoint; from none, of a run without one until now, begin at the weights.

        Raises:
            CheckpointError: the average is of other weights.
        """
        for name, parameter in self._trained.items():
            average, shape = self.tensors[name], whole_shape(self.tensors[name])
            if stored is None:
                held(average).copy_(self._exact(parameter))
            elif name not in stored or shape_of(stored, name) != shape:
                raise CheckpointError(
                    f"the checkpoint's average of the weights has no {name} of shape {tuple(shape)}; resume with the "
                    "model and LoRA settings that the run was started with"
                )
            elif isinstance(average, Piece):
                average.values.copy_(elements_of(stored, name, average))
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


def whole_averages(average: WeightAverage) -> dict[str, Tensor]:
    """Return an average whose tensors are all whole on this rank."""
    assert not any(isinstance(tensor, Piece) for tensor in average.tensors.values())
    return {name: held(tensor) for name, tensor in average.tensors.items()}


def averaged(learner: Learner, use: Use) -> AbstractContextManager[None]:
    """Return a context in which a learner's model has the average of its weights, if that is wanted for the use."""
    average = average_for(learner, use)
    return nullcontext() if average is None else average.in_place()


def _dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)

"""The last whole step of a run: kept so that rank 0 can save it alone, whatever fails after it, on whichever rank.

Where a step is done, the ranks tell each other all that a checkpoint needs beside the weights. From then on no rank has
to wait for another for the checkpoint to be written. The weights are those of the last whole step until an update of
the next one changes them; from there on a copy is what is saved, if there is one. See `alignlab/training/README.md`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from alignlab.models.finite import TAKE_ANOTHER, check_finite
from alignlab.trainers.learner import Learner
from alignlab.trainers.ranks import gather_random_states
from alignlab.training.checkpoint import checkpoint_path, save_checkpoint
from alignlab.training.metrics import MetricsLogger
from alignlab.training.random_state import RandomState
from alignlab.training.run_folder import RunFolder

if TYPE_CHECKING:
    from alignlab.trainers.loop import TrainingLoop

Tensors = dict[str, Mapping[str, Tensor]]
COPY_FRACTION, MAX_COPY_BYTES = 1 / 16, 4 * 2**30
"""Weights in training and their optimizer's state are copied before each step if they take up at most this part of the
memory that holds them, and at most so many bytes: adapters always, and models of up to 350 million weights."""


@dataclass(frozen=True)
class WholeStep:
    """What a checkpoint of a step needs beside the weights.

    Attributes:
        step: that is done.
        state: of the loop and its learners, as JSON.
        random: the generators of each rank.
        num_changes: how often each learner had begun to change its weights.
    """

    step: int
    state: dict[str, Any]
    random: list[RandomState]
    num_changes: list[int]


class StepKeeper:
    """Saves the checkpoints of a run: when asked, and of the last whole step where something fails.

    Args:
        loop: in training.
        folder: of the run.
        logger: its metrics.
    """

    def __init__(self, loop: TrainingLoop, folder: RunFolder, logger: MetricsLogger) -> None:
        self._loop, self._folder, self._logger = loop, folder, logger
        self._whole: WholeStep | None = None
        self._copy: Tensors | None = None
        self._saved_step = loop.step
        self._keeping, self._is_kept = threading.Lock(), False

    def mark(self) -> None:
        """Remember the step that is done; every rank calls this together."""
        loop = self._loop
        state = {
            "train_seconds": loop.train_seconds,
            "signal": loop.signal.state(),
            "learners": {role: learner.progress() for role, learner in loop.learners.items()},
            "loop": loop.state(),
        }
        self._whole = WholeStep(loop.step, state, gather_random_states(loop.accelerator), self._num_changes())

    def copy_weights(self) -> None:
        """Copy what the next step will change, where that costs little: a step may fail half way."""
        live = self._tensors() if self._loop.is_main and self._whole is not None and self._whole.step > 0 else {}
        self._copy = _copied(live, self._copy) if live and _is_small(live) else None

    def save(self) -> Path:
        """Write the checkpoint of the step that is done, and return its folder; every rank calls this together.

        Raises:
            NumericsError: a weight or a number of an optimizer is not finite.
            ConfigError: the folder is this run's no longer.
            RankError: on the other ranks.
        """
        assert self._whole is not None and self._whole.num_changes == self._num_changes(), "it is marked"
        with self._loop.agreed(f"saving the checkpoint of step {self._whole.step}"):
            if self._loop.is_main:
                self._folder.renew()
                self._write(self._whole, self._tensors())
        self._saved_step = self._whole.step
        return checkpoint_path(self._folder.checkpoints, self._whole.step)

    @contextmanager
    def kept_on_failure(self) -> Iterator[None]:
        """Save the last whole step if anything fails within this context, on this rank or, as it learns, on another."""
        try:
            yield
        except BaseException:
            self.keep()
            if self._loop.agreed.failed:  # on all ranks: the first to end must not take rank 0 with it while it saves
                self._loop.accelerator.wait_for_everyone()
            raise

    def keep(self) -> bool:
        """Save the last whole step on rank 0, and say whether that was possible; no rank waits for another here. Once
        alone, from whichever thread comes first; another waits until that is done. Return whether this rank did."""
        with self._keeping:
            if self._loop.is_main and not self._is_kept:
                self._is_kept = True
                self._keep()
            return self._is_kept

    def _keep(self) -> None:
        whole, note = self._whole, self._loop.progress.note
        if whole is None or whole.step == 0:
            return
        self._folder.ended("failed", whole.step)
        tensors = self._tensors() if whole.num_changes == self._num_changes() else self._copy
        if self._saved_step != whole.step and tensors is None:
            note(
                f"step {whole.step + 1} failed when it had changed the weights, which are too large to be copied "
                f"before each step: step {whole.step} is lost. --resume goes on from the last checkpoint; "
                "save_every_steps says how often there is one"
            )
            return
        try:
            if self._saved_step != whole.step and tensors is not None:
                self._folder.renew()
                self._write(whole, tensors)
                self._saved_step = whole.step
        except Exception as error:  # the failure that ended the run is what has to be raised
            note(f"step {whole.step} could not be saved: {type(error).__name__}: {error}")
        else:
            note(f"step {whole.step} is done and saved; go on after it with --resume")

    def _write(self, whole: WholeStep, tensors: Tensors) -> None:
        named = ((f"{group}/{name}", t) for group, each in tensors.items() for name, t in each.items())
        check_finite(named, f"the weights and the optimizer's state after step {whole.step}")
        loop = self._loop
        state = whole.state | {
            "trainer": type(loop).__name__,
            "before": loop.before and loop.before.to_json(),
            "evaluation_due": loop.evaluation_due,
            "metrics": self._logger.state(),
            "identity": loop.identity.to_json(),
            "learners": {
                role: {**whole.state["learners"][role], "frozen": learner.frozen_fingerprint()}
                for role, learner in loop.learners.items()
            },
        }
        save_checkpoint(
            self._folder.checkpoints, whole.step, tensors=tensors, state=state, keep=loop.config.keep_checkpoints,
            random=whole.random, run_id=self._folder.run_id,
        )
        self._folder.saved(whole.step)

    def _tensors(self) -> Tensors:
        """What is trained and its optimizers' state, as it is now."""
        return {
            f"{role}{name}": tensors
            for role, learner in self._loop.learners.items()
            for name, tensors in learner.tensors().items()
        }

    def _num_changes(self) -> list[int]:
        return [learner.num_changes for learner in self._loop.learners.values()]


def check_all_weights(learners: Mapping[str, Learner]) -> None:
    """Raise if a weight that a run begins with, in training or frozen, is not finite.

    Raises:
        NumericsError: naming it.
    """
    weights = ((f"{role}{n}", w) for role, each in learners.items() for n, w in each.policy.named_parameters())
    check_finite(weights, "the weights that the run begins with", fix=TAKE_ANOTHER)


def check_trained_weights(learners: Mapping[str, Learner], step: int) -> None:
    """Raise if a weight in training is not finite after a step.

    Raises:
        NumericsError: naming it.
    """
    weights = ((f"{role}{n}", w) for role, each in learners.items() for n, w in each.trained.items())
    check_finite(weights, f"the weights after step {step}")


def _is_small(tensors: Tensors) -> bool:
    """Whether a copy of the tensors costs little memory, and little time beside that of a step."""
    flat = [tensor for group in tensors.values() for tensor in group.values()]
    needed = sum(tensor.numel() * tensor.element_size() for tensor in flat)
    devices = {tensor.device for tensor in flat if tensor.device.type == "cuda"}
    memory = [torch.cuda.get_device_properties(device).total_memory for device in devices]
    return needed <= min(MAX_COPY_BYTES, COPY_FRACTION * min(memory, default=psutil.virtual_memory().total))


def _copied(tensors: Tensors, earlier: Tensors | None) -> Tensors:
    """A copy of tensors, in the memory of an earlier one where that fits."""
    return {
        group: {name: _copy_of(tensor, (earlier or {}).get(group, {}).get(name)) for name, tensor in each.items()}
        for group, each in tensors.items()
    }


def _copy_of(tensor: Tensor, earlier: Tensor | None) -> Tensor:
    if earlier is None or (earlier.shape, earlier.dtype, earlier.device) != (tensor.shape, tensor.dtype, tensor.device):
        return tensor.detach().clone()
    return earlier.copy_(tensor.detach())

"""The last completed step of a run: kept so that rank 0 can save it alone, whatever fails later, on whichever rank.

At the end of a step the ranks gather all that a checkpoint needs beside the weights. From then on rank 0 can write the
checkpoint without another rank; of weights that are spread over ranks, each rank writes its part. The live weights are
those of the last completed step until an update of the next step changes them; after that the copy is saved, if there
is one. See `alignlab/runs/README.md`.
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

from alignlab.loop.learner import Learner
from alignlab.loop.rank_agreement import gather_random_states
from alignlab.models.finite import TAKE_ANOTHER, check_finite
from alignlab.models.pieces import Held, Piece, held
from alignlab.runs.checkpoint import checkpoint_path, save_checkpoint
from alignlab.runs.checkpoint_parts import ready_parts, write_rank_part
from alignlab.runs.folder import RunFolder
from alignlab.runs.metrics import MetricsLogger
from alignlab.runs.random_state import RandomState

if TYPE_CHECKING:
    from alignlab.loop.training_loop import TrainingLoop

Tensors = dict[str, Mapping[str, Held]]
COPY_FRACTION, MAX_COPY_BYTES = 1 / 16, 4 * 2**30
"""Weights in training and their optimizer's state are copied before each step if they take up at most this fraction of
the memory that holds them, and at most this many bytes: adapters always, and models of up to 350 million weights."""
PARTS_WAIT_S = 30.0
"""How long rank 0 waits for the other ranks' parts of a checkpoint."""


@dataclass(frozen=True)
class CompletedStep:
    """Content of a step's checkpoint beside the weights.

    Attributes:
        step: its number.
        state: state of the loop and its learners, as JSON.
        random: the generators of each rank.
        num_changes: `Learner.num_changes` of each learner at the end of the step.
    """

    step: int
    state: dict[str, Any]
    random: list[RandomState]
    num_changes: list[int]


class StepKeeper:
    """Saves the checkpoints of a run: on request, and of the last completed step where something fails.

    Args:
        loop: the loop in training.
        folder: folder of the run.
        logger: metrics of the run.

    Attributes:
        folder: of the run.
    """

    def __init__(self, loop: TrainingLoop, folder: RunFolder, logger: MetricsLogger) -> None:
        self._loop, self.folder, self._logger = loop, folder, logger
        self._completed: CompletedStep | None = None
        self._copy: Tensors | None = None
        self._saved_step = loop.step
        self._keeping, self._was_kept = threading.Lock(), False
        self._is_spread = any(learner.writes_parts for learner in loop.learners.values())

    def mark(self) -> None:
        """Remember the step that is completed; every rank calls this together."""
        loop = self._loop
        for learner in loop.learners.values() if self._is_spread else ():
            learner.frozen_fingerprint()  # computed by all ranks together, once
        state = {
            "train_seconds": loop.train_seconds,
            "signal": loop.signal.state(),
            "learners": {role: learner.progress() for role, learner in loop.learners.items()},
            "loop": loop.state(),
        }
        self._completed = CompletedStep(loop.step, state, gather_random_states(loop.accelerator), self._num_changes())

    def copy_weights(self) -> None:
        """Copy the tensors that the next step changes, where that costs little: a step may fail half way."""
        has_step = self._completed is not None and self._completed.step > 0
        live = self._tensors() if has_step and (self._loop.is_main or self._is_spread) else {}
        self._copy = _copied(live, self._copy) if live and _is_small(live) else None

    def save(self) -> Path:
        """Write the checkpoint of the completed step, and return its folder; every rank calls this together.

        Raises:
            NumericsError: a weight or an optimizer's state is not finite.
            ConfigError: another process has taken the run's folder.
            RankError: rank 0 has failed; raised on the other ranks.
        """
        completed = self._completed
        assert completed is not None and completed.num_changes == self._num_changes(), "save comes right after mark"
        saving = f"saving the checkpoint of step {completed.step}"
        if self._is_spread:
            with self._loop.agreed(saving):
                self._write_part(completed, self._tensors())
        with self._loop.agreed(saving):
            if self._loop.is_main:
                self.folder.renew()
                self._write(completed, {} if self._is_spread else self._tensors())
        self._saved_step = completed.step
        return checkpoint_path(self.folder.checkpoints, completed.step)

    @contextmanager
    def kept_on_failure(self) -> Iterator[None]:
        """Save the last completed step if this context fails, on this rank or on another that reports it."""
        try:
            yield
        except BaseException:
            self.keep()
            if self._loop.agreed.failed:  # a launcher that sees one rank end ends all: wait while rank 0 saves
                self._loop.accelerator.wait_for_everyone()
            raise

    def keep(self) -> bool:
        """Save the last completed step on rank 0, once, and return whether this is rank 0.

        Waits for no other rank, but for the parts of weights that are spread over ranks, and that for `PARTS_WAIT_S`. A
        second thread that calls this waits until the first has saved.
        """
        with self._keeping:
            if not self._was_kept and (self._loop.is_main or self._is_spread):
                self._was_kept = True
                self._keep()
            return self._loop.is_main and self._was_kept

    def _keep(self) -> None:
        completed, note = self._completed, self._loop.progress.note
        if completed is None or completed.step == 0:
            return
        self.folder.ended("failed", completed.step)
        try:
            is_saved = self._saved_step == completed.step or self._save_before_changes(completed)
        except Exception as error:  # the failure that ended the run is the one to be raised
            note(f"step {completed.step} could not be saved: {type(error).__name__}: {error}")
            return
        if is_saved:
            note(f"step {completed.step} is completed and saved; go on after it with --resume")
            return
        note(
            f"step {completed.step + 1} failed after it had changed the weights, which are too large to be copied "
            f"before each step: step {completed.step} is lost. --resume goes on from the last checkpoint; "
            "checkpoints.every_steps sets how often there is one"
        )

    def _save_before_changes(self, completed: CompletedStep) -> bool:
        """Save the weights as they were at the end of the step; return False where a later step has changed them and
        there is no copy."""
        is_unchanged = completed.num_changes == self._num_changes()
        tensors = self._tensors() if is_unchanged else self._copy
        if tensors is None:
            return False
        if self._is_spread:
            self._write_part(completed, tensors)
        if self._loop.is_main:
            self.folder.renew()
            self._write(completed, {} if self._is_spread else tensors)
        self._saved_step = completed.step
        return True

    def _write_part(self, completed: CompletedStep, tensors: Tensors) -> None:
        """Write what this rank holds of the weights and the optimizer's state."""
        self._check_finite(completed, tensors)
        write_rank_part(self.folder.checkpoints, completed.step, self._loop.ranks.index, tensors)

    def _check_finite(self, completed: CompletedStep, tensors: Tensors) -> None:
        named = (
            (f"{group}/{name}", held(tensor))
            for group, members in tensors.items() for name, tensor in members.items()
        )
        check_finite(named, f"the weights and the optimizer's state after step {completed.step}")

    def _write(self, completed: CompletedStep, tensors: Tensors) -> None:
        """Write the checkpoint on rank 0, of these tensors or of what all ranks have written."""
        self._check_finite(completed, tensors)
        loop = self._loop
        num_parts = loop.ranks.count if self._is_spread else 0
        parts = ready_parts(self.folder.checkpoints, completed.step, num_parts, wait_s=PARTS_WAIT_S)
        state = completed.state | {
            "trainer": type(loop).__name__,
            "before": loop.before and loop.before.to_json(),
            "evaluation_due": loop.evaluations.is_due,
            # With the evaluation after the step, unless that is due.
            "early_stopping": loop.evaluations.stopping.state(),
            "metrics": self._logger.state(),
            "identity": loop.identity.to_json(),
            "learners": {
                role: {**completed.state["learners"][role], "frozen": learner.frozen_fingerprint()}
                for role, learner in loop.learners.items()
            },
        }
        save_checkpoint(
            self.folder.checkpoints, completed.step, tensors=_all_whole(tensors), state=state,
            keep=loop.config.checkpoints.keep, random=completed.random, run_id=self.folder.run_id, parts=parts,
            kept_steps=loop.evaluations.stopping.kept_steps,
        )
        self.folder.saved(completed.step)

    def _tensors(self) -> Tensors:
        """Return the present weights in training and the state of their optimizers."""
        return {
            f"{role}{name}": tensors
            for role, learner in self._loop.learners.items()
            for name, tensors in learner.tensors().items()
        }

    def _num_changes(self) -> list[int]:
        return [learner.num_changes for learner in self._loop.learners.values()]


def check_all_weights(learners: Mapping[str, Learner]) -> None:
    """Raise if a weight at the start of a run, in training or frozen, is not finite.

    Raises:
        NumericsError: with the name of the weight.
    """
    weights = (
        (f"{role}{name}", held(weight))
        for role, learner in learners.items()
        for name, weight in learner.module.named_parameters()
    )
    check_finite(weights, "the weights that the run begins with", fix=TAKE_ANOTHER)


def check_trained_weights(learners: Mapping[str, Learner], step: int) -> None:
    """Raise if a weight in training is not finite after a step.

    Raises:
        NumericsError: with the name of the weight.
    """
    weights = (
        (f"{role}{name}", held(weight))
        for role, learner in learners.items() for name, weight in learner.trained.items()
    )
    check_finite(weights, f"the weights after step {step}")


def _is_small(tensors: Tensors) -> bool:
    """Return whether a copy of the tensors costs little memory, and little time compared with a step."""
    flat = [held(tensor) for group in tensors.values() for tensor in group.values()]
    needed = sum(tensor.numel() * tensor.element_size() for tensor in flat)
    devices = {tensor.device for tensor in flat if tensor.device.type == "cuda"}
    memory = [torch.cuda.get_device_properties(device).total_memory for device in devices]
    return needed <= min(MAX_COPY_BYTES, COPY_FRACTION * min(memory, default=psutil.virtual_memory().total))


def _all_whole(tensors: Tensors) -> dict[str, dict[str, Tensor]]:
    """Return tensors of which this rank holds all."""
    return {group: {name: held(tensor) for name, tensor in members.items()} for group, members in tensors.items()}


def _copied(tensors: Tensors, earlier: Tensors | None) -> Tensors:
    """Return a copy of tensors, in the memory of an earlier copy where that fits."""
    return {
        group: {name: _copy_of(tensor, (earlier or {}).get(group, {}).get(name)) for name, tensor in members.items()}
        for group, members in tensors.items()
    }


def _copy_of(tensor: Held, earlier: Held | None) -> Held:
    own, kept = held(tensor), None if earlier is None else held(earlier)
    if kept is None or (kept.shape, kept.dtype, kept.device) != (own.shape, own.dtype, own.device):
        return tensor.clone() if isinstance(tensor, Piece) else tensor.detach().clone()
    kept.copy_(own.detach())
    assert earlier is not None
    return earlier

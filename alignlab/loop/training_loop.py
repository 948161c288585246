"""The loop that online and offline trainers share: run folder, steps, checkpoints, interruption, resuming."""

from __future__ import annotations

import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from alignlab.config.trainers import TrainerConfig
from alignlab.errors import CheckpointError, NothingLearntError
from alignlab.evaluation.learning_signal import SignalMonitor
from alignlab.evaluation.report import write_report
from alignlab.evaluation.results import Evaluation
from alignlab.loop.averaging import Use, averaged
from alignlab.loop.early_stopping import check_stopping
from alignlab.loop.ending_check import check_ending, on_main_rank
from alignlab.loop.evaluations import Evaluations
from alignlab.loop.learner import Learner
from alignlab.loop.memory import training_bytes
from alignlab.loop.preflight import Preflight
from alignlab.loop.rank_agreement import RankAgreement
from alignlab.loop.rank_watchdog import Position, tell_position, watched
from alignlab.loop.ranks import Ranks
from alignlab.loop.restore import restore_newest
from alignlab.loop.result import NOTHING_LEARNT, TrainResult
from alignlab.loop.run_description import RunDescription
from alignlab.loop.run_files import (
    closing_report,
    complete_models,
    enter_folder,
    open_files,
    save_model_of_step,
    save_trained_model,
)
from alignlab.loop.run_identity import RunIdentity
from alignlab.loop.step_keeper import StepKeeper, check_all_weights, check_trained_weights
from alignlab.models.decoder import causal_lm
from alignlab.models.hub.checkpoints import save_model
from alignlab.models.weight_view import WeightsInside, WeightView
from alignlab.runs.folder import RunFolder
from alignlab.runs.interrupt import Interrupt, catch_interrupts
from alignlab.runs.metrics import MetricsLogger
from alignlab.runs.progress import TrainingProgress

__all__ = ["Callback", "TrainResult", "TrainingLoop"]
_log = logging.getLogger(__name__)
Callback = Callable[[Any, int, Mapping[str, float]], None]


class TrainingLoop(ABC):
    """Runs `train_step` from the first or the resumed step to the last, and saves the results.

    Args:
        config: settings of the trainer.
        learner: model in training and its optimizer.
        tokenizer: saved beside the model.
        callbacks: functions, called as `callback(trainer, step, metrics)` after every step.

    Attributes:
        ranks: this process among the processes of the run.
        agreed: context of a block of work that ends on every rank if it fails on one.
        evaluations: on held-out data, and what early stopping makes of them.
        run: title of the run, its config as text, and what it is a part of; see `describe_run`.
        keeper: saves the run's checkpoints; None outside of `train`.
        phase_seconds: seconds of each phase of the last step.
    """

    def __init__(
        self,
        *,
        config: TrainerConfig,
        learner: Learner,
        tokenizer: Any,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config, self.learner, self.tokenizer = config, learner, tokenizer
        self.ranks: Ranks = learner.ranks
        if not self.is_main:  # the model is made alike on all ranks; from here on each drops its own units
            torch.manual_seed(config.seed + self.ranks.index)
        self.callbacks = tuple(callbacks)
        self.identity = RunIdentity(config, learner.model)
        self.run = RunDescription(
            type(self).__name__, config.model_dump_json(indent=2),
            base_model=causal_lm(learner.model).config.name_or_path or None,
        )
        self.step = 0
        self.train_seconds = 0.0
        self.before: Evaluation | None = None
        self.evaluations = Evaluations(self)
        self.agreed = RankAgreement(learner.accelerator)
        self.keeper: StepKeeper | None = None
        self.progress = TrainingProgress(config.num_steps, enabled=False)
        self.phase_seconds: dict[str, float] = {}
        self.signal = SignalMonitor()

    @property
    def accelerator(self) -> Accelerator:
        return self.learner.accelerator

    def describe_run(self, run: RunDescription) -> None:
        """Take another description of the run, such as of one from a config file; before `train`."""
        self.run = run
        self.identity.describe(run)

    @property
    def is_main(self) -> bool:
        """Return whether this rank writes files and shows progress."""
        return self.ranks.is_main

    @property
    def learners(self) -> dict[str, Learner]:
        """All learners, by the prefix of their tensors in a checkpoint."""
        return {"": self.learner}

    @abstractmethod
    def train_step(self, step: int) -> dict[str, float]:
        """Do one step, counted from 1, over all ranks, and return its metrics."""

    def evaluate(self) -> Evaluation | None:
        """Return an evaluation on held-out data; None without such data."""
        return None

    def evaluated_weights(self, use: Use) -> contextlib.AbstractContextManager[None]:
        """Return a context in which `evaluate` measures the average of the weights, if that is wanted for the use."""
        return averaged(self.learner, use)

    @property
    def is_finished(self) -> bool:
        """Return whether no step is left to do: the last one is done, or early stopping has ended the run."""
        return self.step >= self.config.num_steps or self.evaluations.stopping.ends_run

    @property
    def model_step(self) -> int:
        """Return the step whose weights are the run's model: of an interrupted run, the present one."""
        return self.evaluations.stopping.model_step(self.step) if self.is_finished else self.step

    @property
    def has_held_out(self) -> bool:
        """Return whether there is held-out data."""
        return False

    def open(self, stack: ExitStack, folder: RunFolder, resume_step: int | None) -> None:  # noqa: B027
        """Open the files that a trainer writes in its run folder, to be closed with `stack`; none by default."""

    @property
    def drawn_by_rank(self) -> str:
        """Return what other random numbers change where a run goes on on another number of ranks."""
        return "dropout is drawn anew"

    def check_can_go_on(self) -> None:  # noqa: B027
        """Raise if nothing could be learnt from another step; by default never. Every rank calls this together."""

    def frozen_fingerprints(self) -> dict[str, str]:
        """Return fingerprints, by name, of the models beside the policy that must not change when a run is resumed."""
        return {}

    def state(self) -> dict[str, Any]:
        """Return the state from which a resumed trainer goes on, as JSON."""
        return {"frozen": self.frozen_fingerprints()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Load the output of `state`.

        Raises:
            CheckpointError: a frozen model has changed.
        """
        for name, fingerprint in self.frozen_fingerprints().items():
            if state["frozen"].get(name, fingerprint) != fingerprint:
                raise CheckpointError(
                    f"the {name} has other weights than when the run began, or another config; resume with the {name} "
                    "that the run was started with"
                )

    def train(self, *, resume: bool = False) -> TrainResult:
        """Train to `num_steps`; on SIGINT or SIGTERM, finish the step, save and return.

        If anything fails, on any rank, the last completed step is saved first: see `loop.step_keeper`.

        Args:
            resume: go on from the newest checkpoint in `output_dir`.

        Raises:
            ConfigError: the folder holds a run and `resume` is false, or another process is using it.
            CheckpointError: the newest checkpoint is damaged or another run's, or there is none to resume from.
            NumericsError, RewardError: see `Learner.update`, `RewardRunner.score`.
            RankError: another rank has failed.
            NothingLearntError: the run has ended, with model and report, and nothing could be learnt.
        """
        self.keeper = None
        self.agreed = RankAgreement(self.accelerator)
        with watched(self.position, lambda: self.keeper is not None and self.keeper.keep()), ExitStack() as stack:
            on_main_rank(self.check_ending)  # before the folder is taken
            folder = enter_folder(self, stack, resume=resume)
            for learner in self.learners.values():
                learner.strategy.begin()
            checkpoint = restore_newest(self, folder) if resume else None
            if checkpoint is not None and self.config.checkpoints.with_model:
                complete_models(self, folder)
            logger = open_files(self, stack, folder, checkpoint)
            result = self._train(folder, logger)
            with self.agreed("writing the report"):
                if self.is_main and not result.interrupted:
                    write_report(folder, closing_report(self, result))
            folder.ended(result.outcome, self.step, logger.state())
        self.keeper = None  # with its copy of the weights
        if result.outcome == NOTHING_LEARNT:
            raise NothingLearntError(f"{result.verdict.reason} ({result.model_path} holds unchanged weights)", result)
        return result

    def _train(self, folder: RunFolder, logger: MetricsLogger) -> TrainResult:
        self.progress = TrainingProgress(
            self.config.num_steps, title=self.run.title, done_steps=self.step, enabled=self.is_main,
            on_phase=tell_position,
        )
        keeper = self.keeper = StepKeeper(self, folder, logger)
        with catch_interrupts() as interrupt, self.progress, keeper.kept_on_failure():
            if self.step == 0:
                check_all_weights(self.learners)
                self.before = self.evaluations.run(logger)
            keeper.mark()
            metrics = self._steps(keeper, logger, interrupt)
            interrupted = not self.is_finished
            stopping = None if interrupted else self.evaluations.stopping.outcome(self.step)
            if stopping is not None and stopping.ended_run:
                self.progress.note(self.evaluations.stopping.line(stopping))
            path = save_trained_model(self, folder)  # before the evaluation, whose failure must not lose the model
            after = None if interrupted else self.evaluations.of_trained_model(logger, path)
            signal = (interrupt.signal or "another rank") if self.ranks.any(interrupt.requested) else None
        return TrainResult(
            self.step, self.train_seconds, path, interrupted, signal, metrics, self.before, after,
            folder.path,
            self.signal.verdict(num_updates=self.learner.num_updates, num_skipped=self.learner.num_skipped),
            folder.run_id, self.model_step, stopping,
        )

    def position(self) -> Position:
        """Return step and phase, for the watchdog; may be called from any thread."""
        phase = self.progress.current_phase
        return Position(self.step + (phase != "evaluate"), phase, self.progress.num_phases)

    def usage_hint(self, path: Path) -> str | None:
        """Return a usage hint for the report; None means the `alignlab generate` command."""
        return None

    def _steps(self, keeper: StepKeeper, logger: MetricsLogger, interrupt: Interrupt) -> dict[str, float]:
        """Do the steps until the last or an interrupt; return the metrics of the last step done."""
        metrics: dict[str, float] = {}
        self.evaluations.run_if_due(logger)  # it failed, or was cut short, before the run was resumed
        while not self.is_finished:
            metrics = self._step(keeper)
            messages = self.signal.observe(metrics)
            keeper.mark()
            self.evaluations.is_due = self.evaluations.evaluates_at(self.step)
            with self.agreed(f"writing the metrics of step {self.step}"):
                self._publish_metrics(logger, metrics, messages)
            is_best = self.evaluations.run_if_due(logger)
            is_stopped = self.ranks.any(interrupt.requested)
            if is_stopped or is_best or self.is_finished or self._save_at(self.step):
                self.save()
            if is_stopped and not self.is_finished:
                sender = interrupt.signal or "another rank"
                self.progress.note(f"stopped by {sender} after step {self.step}; go on with --resume")
                break
        return metrics

    def _step(self, keeper: StepKeeper) -> dict[str, float]:
        """Do one step, check the weights, and return its metrics."""
        step, start = self.step + 1, time.perf_counter()
        keeper.copy_weights()
        self.check_can_go_on()
        metrics = self.train_step(step)
        with self.agreed(f"checking the weights after step {step}"):
            check_trained_weights(self.learners, step)
        self.train_seconds += time.perf_counter() - start
        self.step = step
        return metrics

    def save(self) -> Path:
        """Write a checkpoint of the completed step, and return its folder; every rank calls this together.

        Raises:
            NumericsError, ConfigError, RankError: see `StepKeeper.save`.
        """
        assert self.keeper is not None, "save is called during train, such as in a callback"
        if self.config.checkpoints.with_model:
            save_model_of_step(self, self.keeper.folder)
        return self.keeper.save()

    def _publish_metrics(self, logger: MetricsLogger, metrics: Mapping[str, float], messages: Sequence[str]) -> None:
        """Give the metrics of the last step to the metrics file, the display and the callbacks."""
        logger.log(self.step, metrics)
        self.progress.step(self.step, metrics)
        for line in messages if self.is_main else ():
            _log.warning("step %d: %s", self.step, line)
        for callback in self.callbacks:
            callback(self, self.step, metrics)

    def preflight(self) -> Preflight:
        """Return what the training would begin with, or raise if it could not end well; nothing is trained.

        The constructor has made all other checks. A trainer of a model without weights (`models.empty`) makes them too.
        Every rank calls this together.

        Raises:
            ConfigError, CheckpointError: see `check_ending`.
        """
        on_main_rank(self.check_ending)
        return self.contents()

    @abstractmethod
    def contents(self) -> Preflight:
        """Return what the training would begin with."""

    @property
    def frozen_modules(self) -> list[nn.Module]:
        """Modules beside those in training, on the same device."""
        return []

    def predicted_memory(self) -> dict[str, int]:
        """Return the bytes that a training will take on each rank's device, by part; of a model without weights."""
        return training_bytes(self.learners, self.frozen_modules, self.config.memory, self.config.sharding)

    def check_ending(self) -> None:
        """Raise if the run could not end well; see `loop.ending_check`.

        Raises:
            ConfigError, CheckpointError: with what is missing.
        """
        check_stopping(self.config, has_held_out=self.has_held_out)
        check_ending(
            self.config, self.learner.model, self.tokenizer, self.config.output_dir,
            lambda path: self.write_model(path, weights=False, view=self.learner.shapes),
            trained=(weight for learner in self.learners.values() for weight in learner.trained.values()),
            more_bytes=0 if self.learner.average is None else self.learner.average.num_bytes,
        )

    def write_model(self, path: Path, *, weights: bool = True, view: WeightView | None = None) -> None:
        """Write the trained model and its tokenizer, so that others can load them.

        Args:
            weights: see `save_model`.
            view: of the weights of the learner's module; default: `view_of` it.
        """
        of_model = None if view is None else WeightsInside(view, "model")
        save_model(self.learner.model, path, weights=weights, view=of_model)
        self.tokenizer.save_pretrained(path)

    def _save_at(self, step: int) -> bool:
        every = self.config.checkpoints.every_steps
        return every is not None and step % every == 0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show a phase of the step in the progress line, and record its duration in `phase_seconds`."""
        start = time.perf_counter()
        with self.progress.phase(name):
            yield
        self.phase_seconds[name] = time.perf_counter() - start

"""What the online and the offline loop share: the run folder, the steps, checkpoints, interruption, resuming."""

from __future__ import annotations

import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from accelerate import Accelerator

from alignlab.config.trainers import EvaluatedConfig, TrainerConfig
from alignlab.errors import CheckpointError, NothingLearntError
from alignlab.library_errors import writing
from alignlab.models.attention import causal_lm
from alignlab.models.checkpoints import save_model
from alignlab.models.saving import published
from alignlab.trainers.ending import check_ending, on_main_rank
from alignlab.trainers.keeping import StepKeeper, check_all_weights, check_trained_weights
from alignlab.trainers.learner import Learner
from alignlab.trainers.rank_watchdog import Position, tell_position, watched
from alignlab.trainers.ranks import RankAgreement, of_main_rank
from alignlab.trainers.result import TrainResult
from alignlab.trainers.run_identity import RunIdentity
from alignlab.training.checkpoint import Checkpoint, load_latest
from alignlab.training.evaluation import Evaluation, evaluation_from_json
from alignlab.training.interrupt import Interrupt, catch_interrupts
from alignlab.training.learning_signal import SignalMonitor
from alignlab.training.metrics import MetricsLogger
from alignlab.training.progress import TrainingProgress
from alignlab.training.random_state import restore_random_state
from alignlab.training.report import RunReport, write_report
from alignlab.training.run_folder import RunFolder

__all__ = ["Callback", "TrainResult", "TrainingLoop"]
messages = logging.getLogger(__name__)
Callback = Callable[[Any, int, Mapping[str, float]], None]


class TrainingLoop(ABC):
    """Runs `train_step` from the first or the resumed step to the last, and keeps what it makes.

    Args:
        config: the trainer's section.
        learner: policy and optimizer.
        tokenizer: saved beside the model.
        callbacks: each is called as `callback(trainer, step, metrics)` after every step.

    Attributes:
        agreed: ends a block of work on every rank where it fails on one.
        evaluation_due: whether held-out data is still to be evaluated after the last step that was done.
        part_of: id of the run that this run is a stage of; None where it is none.
        keeper: saves the run's checkpoints; None before it is trained.
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
        self.callbacks = tuple(callbacks)
        self.config_text = config.model_dump_json(indent=2)
        self.identity = RunIdentity(config, learner.model)
        self.title = type(self).__name__
        self.base_model = causal_lm(learner.model).config.name_or_path or None
        self.generate_options: tuple[str, ...] = ()
        self.step = 0
        self.train_seconds = 0.0
        self.before: Evaluation | None = None
        self.evaluation_due = False
        self.part_of: str | None = None
        self.agreed = RankAgreement(learner.accelerator)
        self.keeper: StepKeeper | None = None
        self.progress = TrainingProgress(config.num_steps, enabled=False)
        self.signal = SignalMonitor()

    @property
    def accelerator(self) -> Accelerator:
        return self.learner.accelerator

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return bool(self.accelerator.is_main_process)

    @property
    def learners(self) -> dict[str, Learner]:
        """What is trained, by the prefix that its tensors have in a checkpoint."""
        return {"": self.learner}

    @abstractmethod
    def train_step(self, step: int) -> dict[str, float]:
        """One step, counted from 1, over all ranks; returns its metrics."""

    def evaluate(self) -> Evaluation | None:
        """Accuracy on held-out data; None where there is none."""
        return None

    def evaluate_at(self, step: int) -> bool:
        """Whether held-out data is evaluated after this step: every `eval_every_steps`, where there is any."""
        every = self.config.eval_every_steps if isinstance(self.config, EvaluatedConfig) else None
        return self.has_held_out and every is not None and step % every == 0

    @property
    def has_held_out(self) -> bool:
        """Whether there is held-out data."""
        return False

    def open(self, stack: ExitStack, folder: RunFolder, resume_step: int | None) -> None:  # noqa: B027
        """Open what a trainer writes in its run folder, to be closed with `stack`; nothing by default."""

    def frozen(self) -> dict[str, str]:
        """Fingerprint of each model beside the policy that has to be the same when a run goes on, by what it is."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a trainer needs to go on, as JSON."""
        return {"frozen": self.frozen()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave.

        Raises:
            CheckpointError: a frozen model is another.
        """
        for name, now in self.frozen().items():
            if state["frozen"].get(name, now) != now:
                raise CheckpointError(
                    f"the {name} has other weights than when the run began, or another config; resume with the {name} "
                    "that the run was started with"
                )

    def train(self, *, resume: bool = False) -> TrainResult:
        """Train to `num_steps`; SIGINT or SIGTERM finishes the step, saves and returns.

        Whatever fails, on whichever rank, the last whole step is saved first: see `trainers.keeping`.

        Args:
            resume: go on from the newest checkpoint in `output_dir`.

        Raises:
            ConfigError: the folder holds a run and `resume` is false, or another process is using it.
            CheckpointError: the newest checkpoint is damaged or another run's, or there is none to resume from.
            NumericsError, RewardError: see `Learner.update`, `RewardRunner.score`.
            RankError: another rank has failed.
            NothingLearntError: the run is over, with its model and report, and nothing could be learnt from.
        """
        self.keeper = None
        self.agreed = RankAgreement(self.accelerator)
        with watched(self.position, lambda: self.keeper is not None and self.keeper.keep()), ExitStack() as stack:
            on_main_rank(self.check_ending)  # before the folder is taken
            folder = self._enter_folder(stack, resume)
            checkpoint = self._restore(folder) if resume else None
            resume_step = None if checkpoint is None else checkpoint.step
            with self.agreed("opening the files of the run"), writing(folder.path, "the run's files"):
                logger = stack.enter_context(
                    MetricsLogger(
                        folder.path, self.config.trackers, accelerator=self.accelerator, resume_step=resume_step,
                        last_step=max(self.config.num_steps, self.step),
                        saved=None if checkpoint is None else checkpoint.state["metrics"],
                        ended=None if folder.last_end is None else folder.last_end.get("metrics"),
                    )
                )
                self.open(stack, folder, resume_step)
            result = self._train(folder, logger)
            with self.agreed("writing the report"):
                if self.is_main and not result.interrupted:
                    write_report(folder, self._report(result))
            learnt = result.interrupted or not result.verdict.nothing_to_learn_from
            outcome = ("interrupted" if result.interrupted else "done") if learnt else "nothing learnt"
            folder.ended(outcome, self.step, logger.state())
        self.keeper = None  # with its copy of the weights
        if not learnt:
            raise NothingLearntError(f"{result.verdict.reason} ({result.model_path} holds unchanged weights)", result)
        return result

    def _enter_folder(self, stack: ExitStack, resume: bool) -> RunFolder:
        rank = self.accelerator.process_index
        with self.agreed("opening the run's folder"):
            folder = stack.enter_context(
                RunFolder(
                    self.config.output_dir, resume=resume, config_text=self.config_text, rank=rank,
                    part_of=self.part_of,
                )
            )
        folder.run_id = of_main_rank(self.accelerator, (folder.run_id or "").encode()).decode()
        return folder

    def _train(self, folder: RunFolder, logger: MetricsLogger) -> TrainResult:
        self.progress = TrainingProgress(
            self.config.num_steps, title=self.title, done_steps=self.step, enabled=self.is_main, on_phase=tell_position
        )
        keeper = self.keeper = StepKeeper(self, folder, logger)
        with catch_interrupts() as interrupt, self.progress, keeper.kept_on_failure():
            if self.step == 0:
                check_all_weights(self.learners)
                self.before = self._evaluate(logger)
            keeper.mark()
            metrics = self._steps(keeper, logger, interrupt)
            interrupted = self.step < self.config.num_steps
            path = self._save_model(folder)  # first: an evaluation that fails must not lose it
            after = None if interrupted else self._evaluate_trained(logger, path)
        return TrainResult(
            self.step, self.train_seconds, path, interrupted, interrupt.signal, metrics, self.before, after,
            folder.path,
            self.signal.verdict(num_updates=self.learner.num_updates, num_skipped=self.learner.num_skipped),
            folder.run_id,
        )

    def position(self) -> Position:
        """What is being done; may be asked from any thread."""
        phase = self.progress.current_phase
        return Position(self.step + (phase != "evaluate"), phase, self.progress.num_phases)

    def _report(self, result: TrainResult) -> RunReport:
        adapters = self.learner.has_adapters
        return RunReport(
            title=self.title,
            before=result.before,
            after=result.after,
            train_seconds=result.train_seconds,
            num_steps=result.num_steps,
            adapter=result.model_path if adapters else None,
            model=None if adapters else result.model_path,
            generate_options=self.generate_options,
            base_model=self.base_model,
            use=self.use_of(result.model_path),
            verdict=result.verdict,
            run_id=result.run_id,
            summary=self.identity.summary,
        )

    def use_of(self, path: Path) -> str | None:
        """How what was trained is used, where that is not by generating from it."""
        return None

    def _evaluate(self, logger: MetricsLogger) -> Evaluation | None:
        with self.progress.phase("evaluate"), self.agreed(f"evaluating after step {self.step}"):
            result = self.evaluate()
        with self.agreed(f"writing the evaluation after step {self.step}"):  # if every rank has one
            if result is not None:
                logger.log(self.step, result.metrics())
        return result

    def _evaluate_trained(self, logger: MetricsLogger, path: Path) -> Evaluation | None:
        try:
            return self._evaluate(logger)
        except Exception:
            self.progress.note(f"the evaluation failed; what was trained is in {path}")
            raise

    def _steps(self, keeper: StepKeeper, logger: MetricsLogger, interrupt: Interrupt) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if self.evaluation_due:  # it failed, or was cut short, before the run was resumed
            self._evaluate_due(logger)
        while self.step < self.config.num_steps:
            step, start = self.step + 1, time.perf_counter()
            keeper.copy_weights()
            metrics = self.train_step(step)
            with self.agreed(f"checking the weights after step {step}"):
                check_trained_weights(self.learners, step)
            self.train_seconds += time.perf_counter() - start
            self.step = step
            last = step == self.config.num_steps
            self.evaluation_due = self.evaluate_at(step) and not last
            said = self.signal.observe(metrics)
            keeper.mark()
            with self.agreed(f"telling of step {step}"):
                self._tell(logger, metrics, said)
            if self.evaluation_due:
                self._evaluate_due(logger)
            stop = self._any_rank(interrupt.requested)
            if stop or last or self._save_at(step):
                self.save()
            if stop and not last:
                who = interrupt.signal or "another rank"
                self.progress.note(f"stopped by {who} after step {step}; go on with --resume")
                break
        return metrics

    def save(self) -> Path:
        """Write a checkpoint of the step that is done, and return its folder; every rank calls this together.

        Raises:
            NumericsError, ConfigError, RankError: see `StepKeeper.save`.
        """
        assert self.keeper is not None, "called while the run trains, such as in a callback"
        return self.keeper.save()

    def _evaluate_due(self, logger: MetricsLogger) -> None:
        self._evaluate(logger)
        self.evaluation_due = False

    def _tell(self, logger: MetricsLogger, metrics: Mapping[str, float], said: Sequence[str]) -> None:
        """The step just done, to the metrics file, the display and the callbacks."""
        logger.log(self.step, metrics)
        self.progress.step(self.step, metrics)
        for line in said if self.is_main else ():
            messages.warning("step %d: %s", self.step, line)
        for callback in self.callbacks:
            callback(self, self.step, metrics)

    def _restore(self, folder: RunFolder) -> Checkpoint | None:
        """Take back the newest checkpoint and return it; None where the run stopped before its first."""
        with self.agreed("reading the newest checkpoint"):
            checkpoint = load_latest(
                folder.checkpoints, rank=self.accelerator.process_index, world_size=self.accelerator.num_processes,
                run_id=folder.run_id,
            )
            folder.check_newest(None if checkpoint is None else checkpoint.step)
            if checkpoint is not None:
                self._load(checkpoint)
        if checkpoint is not None:
            self.load_state(checkpoint.state["loop"])
            restore_random_state(checkpoint.random)
        return checkpoint

    def _load(self, checkpoint: Checkpoint) -> None:
        """Take back all that the ranks do not have to do together."""
        state = checkpoint.state
        if state["trainer"] != type(self).__name__:
            raise CheckpointError(
                f"{checkpoint.path} was written by {state['trainer']}, not {type(self).__name__}; "
                "resume with the configuration it was started with"
            )
        self.identity.check(state.get("identity"), path=checkpoint.path, step=checkpoint.step, say=self.is_main)
        self.step, self.train_seconds = checkpoint.step, state["train_seconds"]
        self.before = state["before"] and evaluation_from_json(state["before"])
        self.evaluation_due = state["evaluation_due"]
        self.signal.load_state(state["signal"])
        for role, learner in self.learners.items():
            own = {name.removeprefix(role): t for name, t in checkpoint.tensors.items() if name.startswith(role)}
            learner.load(own, state["learners"][role])

    def _save_model(self, folder: RunFolder) -> Path:
        path = folder.adapter if self.learner.has_adapters else folder.model
        with self.agreed("saving what was trained"):
            check_trained_weights(self.learners, self.step)
            if self.is_main:
                folder.renew()
                with published(path, run_id=folder.run_id) as unfinished:
                    self.write_model(unfinished)
        return path

    def check_ending(self) -> None:
        """Raise if the run could not end well; see `trainers.ending`.

        Raises:
            ConfigError, CheckpointError: with what its end needs.
        """
        check_ending(
            self.config, self.learner.model, self.tokenizer, self.config.output_dir,
            lambda path: self.write_model(path, weights=False),
            trained=(weight for learner in self.learners.values() for weight in learner.trained.values()),
        )

    def write_model(self, path: Path, *, weights: bool = True) -> None:
        """Write what was trained and its tokenizer, so that others load them.

        Args:
            weights: see `save_model`.
        """
        save_model(self.learner.model, path, weights=weights)
        self.tokenizer.save_pretrained(path)

    def _save_at(self, step: int) -> bool:
        every = self.config.save_every_steps
        return every is not None and step % every == 0

    def _any_rank(self, flag: bool) -> bool:
        """Whether any rank says so; every rank calls it together."""
        return self.learner.sum_over_ranks(float(flag)) > 0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Self]:
        """Show what the step is doing."""
        with self.progress.phase(name):
            yield self

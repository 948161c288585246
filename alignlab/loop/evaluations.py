"""The evaluations on held-out data in the course of a run, and what early stopping makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from alignlab.evaluation.results import Evaluation
from alignlab.loop.averaging import Use
from alignlab.loop.early_stopping import EarlyStopping
from alignlab.runs.metrics import MetricsLogger

if TYPE_CHECKING:
    from alignlab.loop.training_loop import TrainingLoop


class Evaluations:
    """When held-out data is evaluated, under which weights, and where the results go.

    Args:
        loop: the trainer, whose `evaluate` measures.

    Attributes:
        is_due: whether held-out data still has to be evaluated after the last step.
        stopping: the best evaluation so far, and whether the run has to end.
    """

    def __init__(self, loop: TrainingLoop) -> None:
        self._loop = loop
        self.is_due = False
        self.stopping = EarlyStopping(loop.config.early_stopping)

    def evaluates_at(self, step: int) -> bool:
        """Return whether held-out data, if there is any, is evaluated after this step: every `eval_every_steps`, and
        after the last step where early stopping has to know it before the model is chosen."""
        config, has_held_out = self._loop.config, self._loop.has_held_out
        every = config.eval_every_steps
        if step == config.num_steps:
            return has_held_out and self.stopping.settings is not None
        return has_held_out and every is not None and step % every == 0

    def run(self, logger: MetricsLogger, use: Use = "evaluate") -> Evaluation | None:
        """Evaluate, and log the result; None without held-out data.

        Args:
            use: of the weights, whose average is measured if that is wanted for it.
        """
        loop = self._loop
        evaluating = loop.agreed(f"evaluating after step {loop.step}")
        with loop.progress.phase("evaluate"), evaluating, loop.evaluated_weights(use):
            result = loop.evaluate()
        with loop.agreed(f"writing the evaluation after step {loop.step}"):  # reached only if no rank failed
            if result is not None:
                logger.log(loop.step, result.metrics())
        return result

    def run_if_due(self, logger: MetricsLogger) -> bool:
        """Return whether held-out data was evaluated and, by early stopping's metric, better than ever."""
        if not self.is_due:
            return False
        is_best = self.stopping.observe(self._loop.step, self.run(logger))
        self.is_due = False
        return is_best

    def of_trained_model(self, logger: MetricsLogger, path: Path) -> Evaluation | None:
        """Return the evaluation of the run's model, saved in `path`; early stopping may have made it already."""
        if (result := self.stopping.result_of(self._loop.model_step)) is not None:
            return result
        try:
            return self.run(logger, "export")
        except Exception:
            self._loop.progress.note(f"the evaluation failed; the trained model is in {path}")
            raise

"""The result of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from alignlab.evaluation.learning_signal import Verdict
from alignlab.evaluation.results import Evaluation
from alignlab.loop.early_stopping import StoppingOutcome

NOTHING_LEARNT = "nothing learnt"


@dataclass(frozen=True)
class TrainResult:
    """Result of a training.

    Attributes:
        num_steps: completed steps, with those before a resumption.
        train_seconds: time in steps, without evaluation and set-up.
        model_path: the saved adapter, or the saved model where all weights were trained.
        interrupted: whether a signal stopped it early; `train(resume=True)` goes on.
        signal: name of the signal received, if any. One that arrives during the last step does not interrupt the run.
        metrics: metrics of the last step.
        before, after: evaluation of the starting and of the trained model; None without held-out data.
        folder: folder of the run, with all its files.
        verdict: whether anything was learnt, with the reason and warnings.
        run_id: id of the run, which is in all its files.
        model_step: step whose weights the saved model has; `num_steps`, unless early stopping chooses an earlier one.
        stopping: what early stopping has decided; None without it, or where the run was interrupted.
    """

    num_steps: int
    train_seconds: float
    model_path: Path
    interrupted: bool
    signal: str | None
    metrics: Mapping[str, float]
    before: Evaluation | None
    after: Evaluation | None
    folder: Path
    verdict: Verdict = field(default_factory=Verdict)
    run_id: str | None = None
    model_step: int | None = None
    stopping: StoppingOutcome | None = None

    @property
    def outcome(self) -> str:
        """The outcome that the run's folder records."""
        if self.interrupted:
            return "interrupted"
        return NOTHING_LEARNT if self.verdict.nothing_to_learn_from else "done"

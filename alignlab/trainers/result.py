"""What a training came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from alignlab.training.evaluation import Evaluation
from alignlab.training.learning_signal import Verdict


@dataclass(frozen=True)
class TrainResult:
    """How a training ended.

    Attributes:
        num_steps: steps done, those before a resumption counted.
        train_seconds: time in steps, evaluation and set-up left out.
        model_path: the saved adapter, or the saved model where all weights were trained.
        interrupted: a signal stopped it early; `train(resume=True)` goes on.
        signal: that came, if one did; in the last step it stops nothing.
        metrics: of the last step.
        before, after: held-out accuracy of the starting and of the trained policy; None without held-out data.
        folder: everything the run made.
        verdict: whether anything was learnt, and why not.
        run_id: of the run, in all that it made.
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

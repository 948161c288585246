"""Early stopping: a run ends once its held-out metric no longer improves, and remembers the step that was best.

Prechelt (1998), Early Stopping - But When?, with the criterion of a number of evaluations without progress.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from alignlab.config.trainer import EarlyStoppingSettings, TrainerConfig
from alignlab.errors import ConfigError
from alignlab.evaluation.results import Evaluation, evaluation_from_json

LOWER_IS_BETTER = ("loss",)
"""Metrics that improve by falling; all others improve by rising."""


@dataclass(frozen=True)
class Measurement:
    """An evaluation during training.

    Attributes:
        step: steps that were completed.
        value: of the metric that decides.
        result: the evaluation.
    """

    step: int
    value: float
    result: Evaluation

    def to_json(self) -> dict[str, Any]:
        """Return the measurement as JSON, without the value, which the result holds."""
        return {"step": self.step, "result": self.result.to_json()}

    @classmethod
    def of(cls, step: int, result: Evaluation, metric: str) -> Self:
        """Return the measurement of a metric in an evaluation."""
        return cls(step, float(getattr(result, metric)), result)


@dataclass(frozen=True)
class StoppingOutcome:
    """What early stopping has found and decided.

    Attributes:
        metric: that decides.
        ended_run: whether patience ran out, and the run ended for that.
        best_step, best_value: of the best evaluation; None where none gave a finite number.
        model_step: step whose weights are the run's model.
    """

    metric: str
    ended_run: bool
    best_step: int | None
    best_value: float | None
    model_step: int

    def to_json(self) -> dict[str, Any]:
        """Return the entry of report.json and of the closing line."""
        return {"early_stopping": dict(vars(self))}


class EarlyStopping:
    """The best evaluation of a run, and the number of evaluations since.

    The evaluation before the first step counts as none: no checkpoint has its weights.

    Args:
        settings: of the run; None where it trains to its last step.

    Attributes:
        best, latest: evaluations; None before the first one.
        num_without: evaluations since the best.
    """

    def __init__(self, settings: EarlyStoppingSettings | None) -> None:
        self.settings = settings
        self.best: Measurement | None = None
        self.latest: Measurement | None = None
        self.num_without = 0

    def observe(self, step: int, result: Evaluation | None) -> bool:
        """Take an evaluation, and return whether it is the best; never without settings."""
        if self.settings is None or result is None:
            return False
        self.latest = Measurement.of(step, result, self.settings.metric)
        is_best = self._improves(self.latest.value, self.settings)
        self.best = self.latest if is_best else self.best
        self.num_without = 0 if is_best else self.num_without + 1
        return is_best

    def _improves(self, value: float, settings: EarlyStoppingSettings) -> bool:
        """Return whether a value is better than the best one by more than `min_delta`; not a number never is."""
        if self.best is None:
            return math.isfinite(value)
        gain = self.best.value - value if settings.metric in LOWER_IS_BETTER else value - self.best.value
        return gain > settings.min_delta

    @property
    def ends_run(self) -> bool:
        """Return whether the run has to end."""
        return self.settings is not None and self.num_without >= self.settings.patience

    @property
    def kept_steps(self) -> tuple[int, ...]:
        """Steps whose checkpoints stay, whatever their age."""
        return () if self.best is None else (self.best.step,)

    def model_step(self, last_step: int) -> int:
        """Return the step whose weights become the run's model, once the run has ended after `last_step`."""
        is_best = self.settings is not None and self.settings.export == "best" and self.best is not None
        return self.best.step if is_best and self.best is not None else last_step

    def result_of(self, step: int) -> Evaluation | None:
        """Return the evaluation after a step; None unless that step is the best or the latest."""
        return next((known.result for known in (self.best, self.latest) if known and known.step == step), None)

    def outcome(self, last_step: int) -> StoppingOutcome | None:
        """Return the outcome of a run that has ended after `last_step`; None without settings."""
        if self.settings is None:
            return None
        step, value = (None, None) if self.best is None else (self.best.step, self.best.value)
        return StoppingOutcome(self.settings.metric, self.ends_run, step, value, self.model_step(last_step))

    def line(self, outcome: StoppingOutcome) -> str:
        """Return why the run has ended early, and which step was best."""
        assert self.settings is not None
        by = f" by more than {self.settings.min_delta:g}" if self.settings.min_delta else ""
        return (
            f"early stopping: held-out {outcome.metric} has not improved{by} in {self.num_without} evaluations; "
            + best_line(outcome)
        )

    def state(self) -> dict[str, Any] | None:
        """Return the state for a checkpoint, as JSON; None without settings."""
        if self.settings is None:
            return None
        known = {"best": self.best, "latest": self.latest}
        return {
            "num_without": self.num_without,
            **{name: None if of_step is None else of_step.to_json() for name, of_step in known.items()},
        }

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a state; from none, of a run that had no early stopping until now, begin here."""
        if self.settings is None or state is None:
            return
        metric = self.settings.metric

        def read(of_step: Mapping[str, Any] | None) -> Measurement | None:
            if of_step is None:
                return None
            return Measurement.of(of_step["step"], evaluation_from_json(of_step["result"]), metric)

        self.best, self.latest, self.num_without = read(state["best"]), read(state["latest"]), state["num_without"]


def check_stopping(config: TrainerConfig, *, has_held_out: bool) -> None:
    """Raise if a run is to stop early and has nothing to measure.

    Raises:
        ConfigError: with the argument that is missing.
    """
    if config.early_stopping is not None and not has_held_out:
        raise ConfigError(
            "early_stopping is given, and must be null where there is no held-out data; give eval_dataset, or remove it"
        )


def best_line(outcome: StoppingOutcome) -> str:
    """Return the best step and the step of the model."""
    if outcome.best_step is None or outcome.best_value is None:
        return f"no held-out {outcome.metric} was a finite number; the model is that of step {outcome.model_step}"
    kind = "best" if outcome.model_step == outcome.best_step else "last"
    return (
        f"best {outcome.metric} {outcome.best_value:.4g} after step {outcome.best_step}, whose checkpoint is kept; the "
        f"model is that of step {outcome.model_step}, the {kind}"
    )

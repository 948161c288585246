"""Evidence of whether a run learns, counted from its steps' metrics; warnings while it runs, a verdict at its end.

A step has *signal* if it can move the policy towards what is rewarded or taught: its gradient is not zero and, for
trainers that learn from rewards, at least one of its groups is informative: its rewards differ. A KL penalty, an
entropy bonus and the routers' loss have a gradient too, but teach nothing about the task.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from alignlab.evaluation.signal_messages import (
    SignalSettings,
    SignalSums,
    low_signal_message,
    no_signal_reason,
    skipped_updates_message,
    truncated_message,
    unused_reward_message,
)

PATIENCE = 3
"""Consecutive steps without signal, or with nearly all completions truncated, after which a warning is given."""
LOW_SIGNAL_STEPS, LOW_SIGNAL = 10, 0.25
"""Steps after which a fraction of informative groups below this is warned of."""
TRUNCATED = 0.9
"""Fraction of truncated completions from which a warning is given."""
REPEAT_FACTOR = 10
"""A warning is repeated once its cause has lasted this many times as long as at the last warning."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on a run: has it learnt anything?

    Attributes:
        learnt: whether any step had signal; None if no step was counted.
        reason: why nothing was learnt, and what to change; None if something was.
        warnings: problems of a run that has learnt something, each with what to change.
        nothing_to_learn_from: whether no completion could be trained on, or no update was made, so that the weights are
            those of the start.
    """

    learnt: bool | None = None
    reason: str | None = None
    warnings: tuple[str, ...] = ()
    nothing_to_learn_from: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return entries of report.json and of the closing line: `learnt`, with `reason` and `warnings` if any."""
        entries: dict[str, Any] = {"learnt": self.learnt}
        if self.reason is not None:
            entries["reason"] = self.reason
        return entries | ({"warnings": list(self.warnings)} if self.warnings else {})


@dataclass
class SignalCounts:
    """Counts over a run; the field names are part of checkpoints.

    Attributes:
        total: sums over all steps.
        silent: sums over the latest consecutive steps without signal.
        with_signal: steps with signal that updated the policy.
        cut_streak: the latest consecutive steps with nearly all completions truncated.
        applied: by reward function, steps in which it gave a value.
        due: by warning, how many steps its cause must last before the next warning.
    """

    total: SignalSums = field(default_factory=SignalSums)
    silent: SignalSums = field(default_factory=SignalSums)
    with_signal: int = 0
    cut_streak: int = 0
    applied: dict[str, int] = field(default_factory=dict)
    due: dict[str, int] = field(default_factory=dict)


class SignalMonitor:
    """Counts the signal of each step, and warns where there is little or none.

    Metrics are aggregated over all ranks, so that all ranks reach the same verdict.

    Args:
        settings: facts about the run.
    """

    def __init__(self, settings: SignalSettings | None = None) -> None:
        self.settings = settings or SignalSettings()
        self.counts = SignalCounts()

    def state(self) -> dict[str, Any]:
        """Return the counts, as JSON."""
        return asdict(self.counts)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state`."""
        sums = {name: SignalSums(**state[name]) for name in ("total", "silent")}
        self.counts = SignalCounts(**{**state, **sums})

    def observe(self, metrics: Mapping[str, float]) -> list[str]:
        """Count a step by its metrics, and return the warnings that are due."""
        counts = self.counts
        has_signal = _has_signal(metrics)
        counts.total.add(metrics)
        counts.silent.add(metrics)
        if has_signal:
            counts.silent = SignalSums()
        counts.with_signal += has_signal and "grad_norm" in metrics
        is_truncated = metrics.get("truncated_frac", 0.0) >= TRUNCATED
        counts.cut_streak = counts.cut_streak + 1 if is_truncated else 0
        for name in self.settings.reward_names:
            counts.applied[name] = counts.applied.get(name, 0) + (f"reward/{name}" in metrics)
        return list(self._due_warnings())

    def verdict(self, *, num_updates: int | None = None, num_skipped: int = 0) -> Verdict:
        """Return the verdict on the run so far.

        Args:
            num_updates: updates in the whole run; None if unknown.
            num_skipped: updates skipped because a gradient was not finite.
        """
        total, settings = self.counts.total, self.settings
        if total.steps == 0:
            return Verdict()
        if self.counts.with_signal and num_updates != 0:
            skipped = (skipped_updates_message(num_skipped),) if num_skipped else ()
            return Verdict(True, None, (*self._final_warnings(), *skipped))
        reason = f"nothing was learnt in {total.steps} steps: {no_signal_reason(total, settings)}"
        is_untrained = num_updates == 0 or (settings.max_new_tokens is not None and total.trainable == 0)
        return Verdict(False, reason, (), nothing_to_learn_from=is_untrained)

    @property
    def never_rewarded(self) -> bool:
        """True if the run learns from rewards, and no completion so far has had one."""
        return self.settings.by_rewards and self.counts.total.steps > 0 and self.counts.total.rewarded == 0

    def _due_warnings(self) -> Iterator[str]:
        """Yield warnings of causes that have lasted long enough since the last warning."""
        total, silent, settings = self.counts.total, self.counts.silent, self.settings
        has_low_signal = silent.steps < PATIENCE and self._has_low_signal
        if silent.steps and self._is_due("no_signal", silent.steps, PATIENCE):
            yield f"the last {silent.steps} steps taught nothing: {no_signal_reason(silent, settings)}"
        elif has_low_signal and self._is_due("low_signal", total.steps, LOW_SIGNAL_STEPS):
            yield low_signal_message(total, settings)
        if self.counts.cut_streak and self._is_due("cut_off", self.counts.cut_streak, PATIENCE):
            yield truncated_message(total, settings)
        for name in self._unused_rewards:
            if self._is_due(f"unused/{name}", total.steps, LOW_SIGNAL_STEPS):
                yield unused_reward_message(name, total)

    def _is_due(self, cause: str, lasted: int, first: int) -> bool:
        """Return whether a cause that has lasted some steps is to be warned of, and note when it is next."""
        if lasted < self.counts.due.get(cause, first):
            return False
        self.counts.due[cause] = REPEAT_FACTOR * lasted
        return True

    def _final_warnings(self) -> Iterator[str]:
        """Yield the warnings for the end of a run that had signal."""
        total, settings = self.counts.total, self.settings
        if self._has_low_signal:
            yield low_signal_message(total, settings)
        if total.mean("truncated") >= TRUNCATED:
            yield truncated_message(total, settings)
        for name in self._unused_rewards:
            yield unused_reward_message(name, total)

    @property
    def _has_low_signal(self) -> bool:
        return self.settings.by_rewards and self.counts.total.mean("informative") < LOW_SIGNAL

    @property
    def _unused_rewards(self) -> list[str]:
        """Reward functions that have given no value, if another one has."""
        if self.counts.total.rewarded == 0:
            return []
        return [name for name in self.settings.reward_names if self.counts.applied.get(name, 0) == 0]


def _has_signal(metrics: Mapping[str, float]) -> bool:
    """Return whether a step has signal; a step that does not update the policy yet has, if a group is informative."""
    gradient = metrics.get("grad_norm")
    has_gradient = gradient is None or (math.isfinite(gradient) and gradient > 0)
    return has_gradient and metrics.get("informative_frac", 1.0) > 0

"""Evidence of whether a run learns, counted from the metrics of its steps: said while it runs, and at its end.

A step has *signal* where it can move the policy towards what is rewarded or taught: its gradient is not zero and, for
trainers that learn from rewards, at least one of its groups is informative, see `OnlineTrainer.informative`. A KL
penalty, an entropy bonus and the routers' loss have a gradient too, and teach nothing of the task.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from alignlab.training import signal_sentences as sentences
from alignlab.training.signal_sentences import SignalSettings, SignalSums

PATIENCE = 3
"""Steps in a row without signal, or with nearly every completion cut off, after which it is said."""
LOW_SIGNAL_STEPS, LOW_SIGNAL = 10, 0.25
"""Steps after which a share of informative groups below this is said."""
CUT_OFF = 0.9
"""Share of completions cut off at the length limit, from which on it is said."""
AGAIN = 10
"""What has lasted this many times as long as when it was said is said again."""


@dataclass(frozen=True)
class Verdict:
    """What a run came to.

    Attributes:
        learnt: whether any step had signal; None where no step was counted.
        reason: why nothing was learnt, and what to change; None where something was.
        warnings: what was wrong with much of the run though something was learnt, each with what to change.
        nothing_to_learn_from: not one completion could be trained on, or not one update was made, so that the weights
            are those of the start.
    """

    learnt: bool | None = None
    reason: str | None = None
    warnings: tuple[str, ...] = ()
    nothing_to_learn_from: bool = False

    def to_json(self) -> dict[str, Any]:
        """Entries of report.json and of the closing line: `learnt`, and `reason` and `warnings` if there are any."""
        entries: dict[str, Any] = {"learnt": self.learnt}
        if self.reason is not None:
            entries["reason"] = self.reason
        return entries | ({"warnings": list(self.warnings)} if self.warnings else {})


@dataclass
class SignalCounts:
    """What is counted of a run.

    Attributes:
        total: sums over all steps.
        silent: sums over the last steps in a row without signal.
        with_signal: steps in which the policy was updated with signal.
        cut_streak: the last steps in a row with nearly every completion cut off.
        applied: by reward function, steps in which it gave a value.
        due: by what is said, how long it has to have lasted before it is said next.
    """

    total: SignalSums = field(default_factory=SignalSums)
    silent: SignalSums = field(default_factory=SignalSums)
    with_signal: int = 0
    cut_streak: int = 0
    applied: dict[str, int] = field(default_factory=dict)
    due: dict[str, int] = field(default_factory=dict)


class SignalMonitor:
    """Counts what each step could teach, and says so where that is little or nothing.

    The metrics are over all ranks, so that all ranks come to the same verdict.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: SignalSettings | None = None) -> None:
        self.settings = settings or SignalSettings()
        self.counts = SignalCounts()

    def state(self) -> dict[str, Any]:
        """The counts, as JSON."""
        return asdict(self.counts)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        sums = {name: SignalSums(**state[name]) for name in ("total", "silent")}
        self.counts = SignalCounts(**{**state, **sums})

    def observe(self, metrics: Mapping[str, float]) -> list[str]:
        """Count a step by its metrics, and return what is to be said of the run now."""
        counts = self.counts
        moves = _moves(metrics)
        counts.total.add(metrics)
        counts.silent.add(metrics)
        if moves:
            counts.silent = SignalSums()
        counts.with_signal += moves and "grad_norm" in metrics
        cut_off = metrics.get("truncated_frac", 0.0) >= CUT_OFF
        counts.cut_streak = counts.cut_streak + 1 if cut_off else 0
        for name in self.settings.reward_names:
            counts.applied[name] = counts.applied.get(name, 0) + (f"reward/{name}" in metrics)
        return list(self._due())

    def verdict(self, *, num_updates: int | None = None, num_skipped: int = 0) -> Verdict:
        """What the run came to so far.

        Args:
            num_updates: made in the whole run; None where that is not known.
            num_skipped: left out because a gradient was not finite.
        """
        total, settings = self.counts.total, self.settings
        if total.steps == 0:
            return Verdict()
        if self.counts.with_signal and num_updates != 0:
            skipped = (sentences.skipped(num_skipped),) if num_skipped else ()
            return Verdict(True, None, (*self._warnings(), *skipped))
        reason = f"nothing was learnt in {total.steps} steps: {sentences.why_silent(total, settings)}"
        nothing = num_updates == 0 or (settings.max_new_tokens is not None and total.trainable == 0)
        return Verdict(False, reason, (), nothing_to_learn_from=nothing)

    @property
    def never_rewarded(self) -> bool:
        """Whether rewards are learnt from, and no completion of the run has had one."""
        return self.settings.by_rewards and self.counts.total.steps > 0 and self.counts.total.rewarded == 0

    def _due(self) -> Iterator[str]:
        """What has lasted long enough to be said now."""
        total, silent, settings = self.counts.total, self.counts.silent, self.settings
        if silent.steps and self._is_due("no_signal", silent.steps, PATIENCE):
            yield f"the last {silent.steps} steps taught nothing: {sentences.why_silent(silent, settings)}"
        elif silent.steps < PATIENCE and self._is_low and self._is_due("low_signal", total.steps, LOW_SIGNAL_STEPS):
            yield sentences.low_signal(total, settings)
        if self.counts.cut_streak and self._is_due("cut_off", self.counts.cut_streak, PATIENCE):
            yield sentences.cut_off(total, settings)
        for name in self._unused:
            if self._is_due(f"unused/{name}", total.steps, LOW_SIGNAL_STEPS):
                yield sentences.unused(name, total)

    def _is_due(self, what: str, lasted: int, first: int) -> bool:
        if lasted < self.counts.due.get(what, first):
            return False
        self.counts.due[what] = AGAIN * lasted
        return True

    def _warnings(self) -> Iterator[str]:
        """What is to be said at the end of a run that had signal."""
        total, settings = self.counts.total, self.settings
        if self._is_low:
            yield sentences.low_signal(total, settings)
        if total.share("truncated") >= CUT_OFF:
            yield sentences.cut_off(total, settings)
        for name in self._unused:
            yield sentences.unused(name, total)

    @property
    def _is_low(self) -> bool:
        return self.settings.by_rewards and self.counts.total.share("informative") < LOW_SIGNAL

    @property
    def _unused(self) -> list[str]:
        """Reward functions that have given no value at all, where another has."""
        if self.counts.total.rewarded == 0:
            return []
        return [name for name in self.settings.reward_names if self.counts.applied.get(name, 0) == 0]


def _moves(metrics: Mapping[str, float]) -> bool:
    """Return whether a step has signal; one in which the policy is not updated yet, if its groups are informative."""
    gradient = metrics.get("grad_norm")
    moves = gradient is None or (math.isfinite(gradient) and gradient > 0)
    return moves and metrics.get("informative_frac", 1.0) > 0

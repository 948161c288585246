"""Messages for a run that learns little or nothing: the cause, and what to change.

A reward of 0 or 1 that a completion reaches with probability p is informative in a group of G with probability
1 - p^G - (1-p)^G, the probability that the G completions are neither all right nor all wrong (Yu et al. (2025), DAPO,
arXiv:2503.14476, Sec. 3.2, whose dynamic sampling replaces the other groups).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

OFTEN_TRUNCATED = 0.5
"""Fraction of truncated completions from which a longer limit is advised where there is little signal."""


def expected_informative(success_rate: float, group_size: int) -> float:
    """Return the probability that the 0-1 rewards of a group differ: 1 - p^G - (1-p)^G.

    Args:
        success_rate: p, the probability that a completion's reward is 1, in [0, 1].
        group_size: G, >= 1.
    """
    return 1.0 - success_rate**group_size - (1.0 - success_rate) ** group_size


@dataclass(frozen=True)
class SignalSettings:
    """Facts about a run that the messages depend on.

    Attributes:
        by_rewards: whether the run learns from rewards, rather than from a teacher or a dataset's completions.
        by_group: whether a reward is compared with those of its group, rather than with those of the whole step.
        group_size: completions of a prompt.
        max_new_tokens: limit of a completion's length; None where nothing is sampled.
        mask_truncated: whether truncated completions are left out of the loss.
        temperature: sampling temperature.
        can_resample: whether `dynamic_sampling`, which replaces groups without signal, is available and off.
        reward_names: names of the reward functions.
    """

    by_rewards: bool = False
    by_group: bool = False
    group_size: int = 1
    max_new_tokens: int | None = None
    mask_truncated: bool = False
    temperature: float = 1.0
    can_resample: bool = False
    reward_names: tuple[str, ...] = ()


@dataclass
class SignalSums:
    """Sums over some steps of a run; the field names are part of checkpoints.

    Attributes:
        steps: number of steps.
        updates: steps that updated the policy.
        not_finite: steps whose gradient was not finite.
        informative, trainable, truncated: sums over the steps of the fraction of informative groups, of trainable
            completions and of truncated completions.
        rewarded: steps with any reward.
        reward: sum over these steps of the mean reward.
        reward_min, reward_max: over all rewards; None without any.
        binary: whether every reward was 0 or 1.
    """

    steps: int = 0
    updates: int = 0
    not_finite: int = 0
    informative: float = 0.0
    trainable: float = 0.0
    truncated: float = 0.0
    rewarded: int = 0
    reward: float = 0.0
    reward_min: float | None = None
    reward_max: float | None = None
    binary: bool = True

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add one step."""
        self.steps += 1
        gradient = metrics.get("grad_norm")
        self.updates += gradient is not None
        self.not_finite += gradient is not None and not math.isfinite(gradient)
        self.informative += metrics.get("informative_frac", 0.0)
        self.trainable += metrics.get("trainable_frac", 0.0)
        self.truncated += metrics.get("truncated_frac", 0.0)
        if "reward_min" in metrics:
            self._add_rewards(*(metrics[name] for name in ("reward_min", "reward_max", "reward", "reward_std")))

    def _add_rewards(self, low: float, high: float, mean: float, std: float) -> None:
        self.rewarded += 1
        self.reward += mean
        self.reward_min = low if self.reward_min is None else min(low, self.reward_min)
        self.reward_max = high if self.reward_max is None else max(high, self.reward_max)
        # The mean square of numbers in [0, 1] equals their mean only if all are 0 or 1.
        self.binary = self.binary and low >= 0 and high <= 1 and math.isclose(std**2 + mean**2, mean, abs_tol=1e-9)

    def mean(self, name: str) -> float:
        """Return the mean over the steps of a summed fraction."""
        return float(getattr(self, name)) / max(self.steps, 1)

    @property
    def success_rate(self) -> float | None:
        """Mean reward if every reward was 0 or 1; None otherwise."""
        return self.reward / self.rewarded if self.rewarded and self.binary else None


def no_signal_reason(sums: SignalSums, settings: SignalSettings) -> str:
    """Return why these steps taught nothing, and what to change."""
    return _cause(sums, settings) + _advice(sums, settings)


def low_signal_message(sums: SignalSums, settings: SignalSettings) -> str:
    """Return how few groups were informative, how many were to be expected, and what to change."""
    unit = "groups" if settings.by_group else "steps"
    text = f"only {sums.mean('informative'):.0%} of the {unit} had rewards that differ, and the others taught nothing"
    rate = sums.success_rate
    if settings.by_group and rate is not None and 0 < rate < 1:
        size, larger = settings.group_size, 4 * settings.group_size
        expected, expected_larger = (expected_informative(rate, number) for number in (size, larger))
        text += (
            f" (where {rate:.1%} of completions get the reward 1, and the others 0, 1 - p^G - (1-p)^G = "
            f"{expected:.0%} of groups of {size} are informative if all prompts are as hard, and {expected_larger:.0%} "
            f"of groups of {larger})"
        )
    return text + _advice(sums, settings)


def truncated_message(sums: SignalSums, settings: SignalSettings) -> str:
    """Return how many completions were truncated, and what to change."""
    return (
        f"{sums.mean('truncated'):.0%} of completions were cut off at sampling.max_new_tokens "
        f"({settings.max_new_tokens}) before their end; raise it, unless that is meant"
    )


def unused_reward_message(name: str, sums: SignalSums) -> str:
    """Return that a reward function never gave a value, and what to look at."""
    return (
        f"the reward {name!r} gave no value to any completion of {sums.steps} steps; see that the data have rows that "
        "it applies to, and the log for its failures"
    )


def skipped_updates_message(count: int) -> str:
    """Return how many updates were skipped, and what to change."""
    return f"{count} updates were skipped, as a gradient was not finite; lower optim.learning_rate"


def _cause(sums: SignalSums, settings: SignalSettings) -> str:
    """Return why these steps have no signal."""
    if settings.by_rewards and sums.rewarded == 0:
        names = " and ".join(map(repr, settings.reward_names))
        return f"no completion got a reward, for {names} gave None for each or failed"
    if settings.max_new_tokens is not None and sums.trainable == 0:
        return (
            f"every completion was cut off at sampling.max_new_tokens ({settings.max_new_tokens}), and mask_truncated "
            "leaves such completions out"
        )
    if sums.not_finite and sums.not_finite == sums.updates:
        return "no gradient was finite, so that every update was skipped"
    if not settings.by_rewards:
        return "every gradient was zero"
    if sums.reward_min == sums.reward_max:
        return f"every completion got the same reward, {sums.reward_min:g}"
    return f"all rewards were equal within each {'group' if settings.by_group else 'step'}"


def _advice(sums: SignalSums, settings: SignalSettings) -> str:
    """Return what to change where there is little or no signal; empty if there is no advice."""
    advice: list[str] = []
    if settings.by_rewards and sums.rewarded == 0:
        advice.append("see the log for failures, and try the rewards with alignlab check")
    if settings.max_new_tokens is not None and sums.mean("truncated") >= OFTEN_TRUNCATED:
        advice.append(
            f"raise sampling.max_new_tokens ({settings.max_new_tokens}), at which {sums.mean('truncated'):.0%} of "
            "completions were cut off"
        )
    if sums.not_finite:
        advice.append("lower optim.learning_rate")
    if settings.by_rewards and sums.rewarded:
        advice += _advice_on_rewards(sums, settings)
    return f". To change that: {'; '.join(advice)}" if advice else ""


def _advice_on_rewards(sums: SignalSums, settings: SignalSettings) -> Iterator[str]:
    """Yield what to change where rewards do not differ enough."""
    rate = sums.success_rate
    if rate is None and sums.reward_min == sums.reward_max:
        yield "give a reward that tells completions apart"
    elif rate is not None and rate > 0.5:
        yield "take harder data"
    else:
        yield "take easier data, a warm start, or a reward that gives a part of the credit"
    if settings.by_group:
        yield f"raise group_size ({settings.group_size})"
    if settings.temperature < 1:
        yield f"raise sampling.temperature ({settings.temperature:g})"
    if settings.can_resample and sums.informative > 0:
        yield "use recipe: dapo, which samples other prompts in place of such groups"

"""What is said of a run that learns little or nothing, from hand-made metrics of its steps."""

import json
import math
from typing import Any

import pytest

from alignlab.evaluation.learning_signal import SignalMonitor, Verdict
from alignlab.evaluation.signal_messages import SignalSettings, expected_informative

GROUPS = SignalSettings(
    by_rewards=True, by_group=True, group_size=8, max_new_tokens=24, can_resample=True, reward_names=("right",)
)


def step(rewards: tuple[float, ...] = (0.0, 1.0), informative: float = 0.5, **changes: Any) -> dict[str, float]:
    """Metrics of a step whose completions got `rewards`."""
    metrics: dict[str, float] = {
        "grad_norm": 1.0 if informative else 0.0, "informative_frac": informative,
        "trainable_frac": float(bool(rewards)), "truncated_frac": 0.0,
    }
    if rewards:
        mean = sum(rewards) / len(rewards)
        std = math.sqrt(sum(reward**2 for reward in rewards) / len(rewards) - mean**2)
        metrics |= {"reward": mean, "reward_std": std, "reward_min": min(rewards), "reward_max": max(rewards)}
        metrics["reward/right"] = mean
    return metrics | changes


def run(*steps: dict[str, float], settings: SignalSettings = GROUPS) -> tuple[list[tuple[int, str]], Verdict]:
    """What is said, by step, and the verdict."""
    monitor = SignalMonitor(settings)
    warnings = [(number, text) for number, metrics in enumerate(steps, 1) for text in monitor.observe(metrics)]
    return warnings, monitor.verdict()


@pytest.mark.parametrize(
    ("rate", "group_size", "expected"),
    [(0.5, 2, 0.5), (0.5, 8, 1 - 2 / 256), (0.1, 2, 0.18), (0.0, 8, 0.0), (1.0, 8, 0.0), (0.3, 1, 0.0)],
)
def test_expected_share_of_informative_groups(rate: float, group_size: int, expected: float) -> None:
    assert expected_informative(rate, group_size) == pytest.approx(expected, abs=1e-12)


def test_a_run_with_signal_gives_no_warning() -> None:
    warnings, verdict = run(*[step()] * 40)
    assert warnings == [] and verdict.to_json() == {"learnt": True}


def test_no_step_gives_no_verdict() -> None:
    assert run()[1].to_json() == {"learnt": None}


def test_three_steps_without_signal_are_warned_of_and_again_after_ten_times_as_many() -> None:
    warnings, verdict = run(*[step((0.0, 0.0), 0.0)] * 40)
    assert [number for number, _ in warnings] == [3, 30]
    text = warnings[0][1]
    assert text.startswith("the last 3 steps taught nothing: every completion got the same reward, 0. To change")
    assert "group_size (8)" in warnings[0][1] and "easier data" in warnings[0][1]
    assert verdict.learnt is False and not verdict.nothing_to_learn_from
    assert verdict.reason is not None and verdict.reason.startswith("nothing was learnt in 40 steps: every")


def test_two_steps_without_signal_between_others_are_not_warned_of() -> None:
    warnings, verdict = run(*[step(), step((0.0,), 0.0), step((0.0,), 0.0)] * 3)
    assert warnings == [] and verdict.learnt


@pytest.mark.parametrize(
    ("steps", "cause", "advice"),
    [
        ([step((), 0.0)] * 3, "no completion got a reward, for 'right' gave None for each or failed", "alignlab check"),
        ([step((1.0, 1.0), 0.0)] * 3, "every completion got the same reward, 1.", "take harder data"),
        ([step((0.7, 0.7), 0.0)] * 3, "every completion got the same reward, 0.7.", "tells completions apart"),
        ([step((0.0,), 0.0), step((1.0,), 0.0), step((0.0,), 0.0)], "were equal within each group", "easier"),
        ([step((0.0,), 0.0, truncated_frac=0.75)] * 3, "the same reward, 0", r"max_new_tokens (24), at which 75% of"),
        ([step(informative=0.5, grad_norm=math.nan)] * 3, "no gradient was finite", "lower optim.learning_rate"),
    ],
)
def test_a_warning_has_the_cause_and_what_to_change(steps: list[dict[str, float]], cause: str, advice: str) -> None:
    warnings, verdict = run(*steps)
    assert verdict.learnt is False and verdict.reason is not None
    for text in (verdict.reason, warnings[0][1]):
        assert cause in text and advice in text


def test_the_cause_is_read_from_the_steps_without_signal_only() -> None:
    warnings, _ = run(*[step()] * 5, *[step((), 0.0)] * 3)
    assert [(number, "no completion got a reward" in text) for number, text in warnings] == [(8, True)]


def test_masked_truncated_completions_are_nothing_to_learn_from() -> None:
    settings = SignalSettings(by_rewards=True, max_new_tokens=24, mask_truncated=True, reward_names=("right",))
    _, verdict = run(*[step(informative=0.0, trainable_frac=0.0, truncated_frac=1.0)] * 3, settings=settings)
    assert verdict.nothing_to_learn_from and verdict.reason is not None
    assert "cut off at sampling.max_new_tokens (24), and mask_truncated leaves such completions out" in verdict.reason


def test_few_informative_groups_are_warned_of_with_the_expected_fraction() -> None:
    rewards = (1.0,) + (0.0,) * 99  # p = 1 %: 1 - 0.01^8 - 0.99^8 = 7.7 %, and of groups of 32 27.5 %
    warnings, verdict = run(*[step(rewards, 0.2)] * 10)
    assert [number for number, _ in warnings] == [10]
    for text in (warnings[0][1], verdict.warnings[0]):
        assert text.startswith("only 20% of the groups had rewards that differ")
        assert "1.0% of completions get the reward 1" in text
        assert "= 8% of groups of 8 are informative" in text and "28% of groups of 32" in text
        assert "recipe: dapo" in text
    assert verdict.learnt and verdict.to_json()["warnings"] == list(verdict.warnings)


def test_rewards_between_0_and_1_have_no_success_rate() -> None:
    _, verdict = run(*[step((0.0, 0.5, 1.0), 0.1)] * 10)
    assert "p^G" not in verdict.warnings[0]


def test_truncated_completions_are_warned_of_once() -> None:
    warnings, verdict = run(*[step(truncated_frac=0.95)] * 12)
    assert [number for number, _ in warnings] == [3]
    assert "95% of completions were cut off at sampling.max_new_tokens (24)" in warnings[0][1]
    assert verdict.learnt and verdict.warnings == (warnings[0][1],)
    assert run(*[step(truncated_frac=0.85)] * 12) == ([], Verdict(True))


def test_a_reward_that_never_applied_beside_another_is_warned_of() -> None:
    settings = SignalSettings(by_rewards=True, max_new_tokens=24, reward_names=("right", "code"))
    warnings, verdict = run(*[step()] * 10, settings=settings)
    assert [number for number, _ in warnings] == [10] and verdict.learnt
    assert verdict.warnings[0].startswith("the reward 'code' gave no value to any completion of 10 steps")


def test_a_step_without_an_update_is_no_learning() -> None:
    """As in the first steps of PPO, in which the critic alone learns."""
    metrics = {name: value for name, value in step().items() if name != "grad_norm"}
    warnings, verdict = run(*[metrics] * 5)
    assert warnings == [] and verdict.learnt is False


def test_gradients_without_an_informative_group_teach_nothing() -> None:
    """A KL penalty has a gradient, too."""
    _, verdict = run(*[step((0.0,), 0.0, grad_norm=0.3)] * 3)
    assert verdict.learnt is False


def test_a_trainer_without_rewards_learns_by_its_gradient() -> None:
    assert run({"grad_norm": 0.1}, settings=SignalSettings())[1].learnt
    warnings, verdict = run(*[{"grad_norm": 0.0}] * 3, settings=SignalSettings())
    assert verdict.reason == "nothing was learnt in 3 steps: every gradient was zero" and len(warnings) == 1
    assert not verdict.nothing_to_learn_from


def test_a_resumed_run_goes_on_counting() -> None:
    first = SignalMonitor(GROUPS)
    for _ in range(2):
        assert first.observe(step((0.0,), 0.0)) == []
    second = SignalMonitor(GROUPS)
    second.load_state(json.loads(json.dumps(first.state())))
    assert len(second.observe(step((0.0,), 0.0))) == 1
    for _ in range(26):
        assert second.observe(step((0.0,), 0.0)) == [], "it was said already"
    assert second.counts.total.steps == 29 and second.never_rewarded is False

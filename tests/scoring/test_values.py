"""Arguments that a reward may write into, and results that lie, raise or hang when they are read."""

import copy
import itertools
import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from alignlab.config.rewards import RewardLimits, RewardSettings
from alignlab.errors import RewardError
from alignlab.scoring.loading import LoadedReward, load_reward
from alignlab.scoring.runner import RewardRunner
from tests.scoring.test_runner import PAIR, SHORT_S, lengths, rollout


def make(*rewards: Any, time_limit_s: float = 20.0) -> RewardRunner:
    loaded = [reward if isinstance(reward, LoadedReward) else load_reward(reward) for reward in rewards]
    return RewardRunner(loaded, RewardLimits(time_limit_s=time_limit_s))


def test_every_call_gets_its_own_copies() -> None:
    """Not with the rollouts, the other rewards, the next call, the other samples or the settings."""
    chat = [{"role": "user", "content": "q", "parts": [{"a": [1]}]}]
    asked = [rollout(chat, ["a", "b"], tests=[{"input": [1]}], gold=np.array([1, 2]))]
    seen: list[Any] = []

    def vandal(prompts: Any, completions: Any, completion_ids: Any, prompt_ids: Any, tests: Any, gold: Any, keys: Any):
        seen.append(copy.deepcopy([prompts, completions, completion_ids, prompt_ids, tests, gold, keys]))
        prompts[0][0]["parts"][0]["a"].append(2)
        prompts[0][0]["content"] = "changed"
        completions[0][0]["content"] = "changed"
        completion_ids[0].append(7)
        prompt_ids[0].append(7)
        tests[0][0]["input"].append(2)
        assert tests[1] == [{"input": [1]}] and prompts[1] == chat, "of another sample"
        gold[0][0] = 9
        keys["deep"].append(2)
        return [0.0, 0.0]

    options = {"keys": {"deep": [1]}}
    before = copy.deepcopy((chat, options))
    runner = make(*[LoadedReward("vandal", vandal, options=options)] * 2)
    scored = [runner.score(asked), runner.score(asked)]
    assert runner.num_failures == 0, runner.last_failures
    assert len(seen) == 4
    np.testing.assert_equal(seen[1:], seen[:1] * 3)
    assert (chat, options) == before
    for [each] in scored:
        assert each.prompt.text == chat and each.prompt.columns["tests"] == [{"input": [1]}]
        assert each.prompt.columns["gold"].tolist() == [1, 2] and each.completions == asked[0].completions


def test_a_class_that_changes_its_options_leaves_the_settings_unchanged() -> None:
    settings = RewardSettings(name=f"{__name__}.Growing", options={"words": ["a"]})
    load_reward(settings).function(completions=["a"])
    assert settings.options == {"words": ["a"]}


class Growing:
    def __init__(self, words: list[str]) -> None:
        self.words = words

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        self.words += completions
        return [0.0] * len(completions)


def test_an_object_that_cannot_be_copied_is_passed_in_a_copied_container() -> None:
    lock = threading.Lock()

    def reward(completions: list[str], lock: list[Any]) -> list[float]:
        lock.append(1)
        return [1.0] * len(completions)

    options = {"lock": [lock, {"of": lock}]}
    runner = make(LoadedReward("reward", reward, options=options))
    assert runner.score(PAIR)[0].rewards == (1.0, 1.0)
    assert options == {"lock": [lock, {"of": lock}]}


class Endless(list):  # type: ignore[type-arg]
    """Says that it has four values, and has no end."""

    def __iter__(self) -> Iterator[float]:  # type: ignore[override]
        return itertools.repeat(1.0)

    def __len__(self) -> int:
        return 4


class Raising(float):
    """Raises in whatever is asked of it."""

    def __float__(self) -> float:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no")

    def item(self) -> float:
        raise RuntimeError("no")


class Untold(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


def untold(**columns: Any) -> list[float]:
    raise Untold


@pytest.mark.parametrize(
    ("reward", "kind", "named"),
    [
        (lambda **columns: Endless(), "wrong count", "must return 4 values.*returned more"),
        (lambda **columns: [Raising()] * 4, "not a number", r"returned a value of type Raising \(Raising\)"),
        (lambda **columns: [10**5000] * 4, "not finite", "returned a value of type int"),
        (lambda **columns: np.array([Raising(), None, 1, 2], dtype=object), "not a number", "of type Raising"),
        (untold, "raised", r"Untold: \(its text cannot be read\)"),
    ],
)
def test_a_result_that_lies_about_its_length_or_raises_is_a_failure(reward: Any, kind: str, named: str) -> None:
    runner = make(LoadedReward("bad", reward), lengths)
    assert runner.score(PAIR)[0].reward_parts["lengths"] == (1.0, 2.0)
    assert runner.failures == {("bad", kind): 1}
    assert re.search(named, runner.last_failures["bad"])


def test_a_value_that_hangs_when_it_is_read_is_a_timeout() -> None:
    release = threading.Event()

    class Hanging(float):
        def __float__(self) -> float:
            release.wait()
            return 1.0

    runner = make(LoadedReward("bad", lambda **columns: [Hanging()] * 4), lengths, time_limit_s=SHORT_S)
    try:
        assert runner.score(PAIR)[0].reward_parts == {"bad": (None, None), "lengths": (1.0, 2.0)}
        assert runner.failures == {("bad", "timeout"): 1}
    finally:
        release.set()


@pytest.mark.parametrize("values", [(1e308, -1e308), (1e19, 0.0), (-1e18, -1e18)])
def test_rewards_whose_squares_overflow_float32_are_refused(values: tuple[float, float]) -> None:
    def given(value: float) -> Any:
        return lambda **columns: [value] * 4

    rewards = [LoadedReward(f"r{i}", given(value), 10.0) for i, value in enumerate(values)]
    with pytest.raises(RewardError, match=r"must lie within 1e\+18 and -1e\+18, and do not: r0 "):
        make(*rewards).score(PAIR)

import asyncio
import decimal
import fractions
import logging
import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from alignlab.config.rewards import RewardLimits, RewardSettings
from alignlab.errors import AlignlabError, DiskError, JudgeError, NumericsError, RewardError
from alignlab.scoring.calls import InlineReward
from alignlab.scoring.loading import LoadedReward, load_reward
from alignlab.scoring.runner import RewardRunner
from alignlab.types import Completion, Message, Prompt, Rollout, Text

Make = Callable[..., RewardRunner]
SHORT_S = 0.05


@pytest.fixture
def make() -> Iterator[Make]:
    """Runners over functions or loaded rewards, closed at the end."""
    runners: list[RewardRunner] = []

    def build(*rewards: Any, max_failures: int = 10, time_limit_s: float = 20.0) -> RewardRunner:
        loaded = [reward if isinstance(reward, LoadedReward) else load_reward(reward) for reward in rewards]
        runners.append(RewardRunner(loaded, RewardLimits(max_failures=max_failures, time_limit_s=time_limit_s)))
        return runners[-1]

    yield build
    for runner in runners:
        runner.close()


def rollout(text: Text, completions: Sequence[str], **columns: Any) -> Rollout:
    group = tuple(Completion.of((len(done),), done) for done in completions)
    return Rollout(Prompt((1,), text, columns=columns), group)


PAIR = [rollout("q1", ["a", "bb"], answer="x", only="here"), rollout("q2", ["ccc", "dddd"], answer="y")]


def lengths(*, completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def even(*, completions: list[str], **columns: Any) -> list[float | None]:
    return [1.0 if len(text) % 2 == 0 else None for text in completions]


async def async_lengths(*, completions: list[str], **columns: Any) -> list[float]:
    await asyncio.sleep(0)
    return [float(len(text)) for text in completions]


def same(rewards: Sequence[float], expected: Sequence[float]) -> bool:
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(rewards, expected, strict=True))


def test_a_reward_is_the_weighted_sum_of_the_parts_that_apply(make: Make) -> None:
    scored = make(LoadedReward("lengths", lengths, 0.5), LoadedReward("even", even, -1.0)).score(PAIR)
    assert [r.rewards for r in scored] == [(0.5, 0.0), (1.5, 1.0)]
    assert [dict(r.reward_parts) for r in scored] == [
        {"lengths": (1.0, 2.0), "even": (None, 1.0)},
        {"lengths": (3.0, 4.0), "even": (None, 1.0)},
    ]
    assert [(r.prompt, r.completions) for r in scored] == [(r.prompt, r.completions) for r in PAIR]


def test_a_completion_without_any_part_has_reward_nan(make: Make) -> None:
    runner = make(even)
    scored = runner.score(PAIR)
    assert same([x for r in scored for x in r.rewards], [math.nan, 1.0, math.nan, 1.0])
    assert runner.num_failures == 0


def test_none_for_every_sample_is_no_failure(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """A batch may hold rows of another task alone."""
    runner = make(lambda completions, **columns: [None] * len(completions), max_failures=0)
    for _ in range(3):
        assert all(math.isnan(reward) for rollout in runner.score(PAIR) for reward in rollout.rewards)
    assert runner.num_failures == 0 and not caplog.records
    assert runner.num_calls["<lambda>"] == runner.num_useful_calls["<lambda>"] == 3


@pytest.mark.parametrize(
    "values",
    [
        np.array([math.nan, 1.0, math.nan, 0.5]), torch.tensor([math.nan, 1.0, math.nan, 0.5]),
        pd.Series([None, 1.0, None, 0.5]), pd.Series([pd.NA, 1.0, pd.NA, 0.5], dtype="Float64"),
        pd.Series([None, 1, None, 0.5], dtype=object),
    ],
)
def test_nan_in_an_array_counts_as_none(make: Make, values: Any) -> None:
    runner = make(LoadedReward("array", lambda **columns: values))
    assert [rollout.reward_parts["array"] for rollout in runner.score(PAIR)] == [(None, 1.0), (None, 0.5)]
    assert runner.num_failures == 0


def test_a_dataset_column_that_no_row_of_a_call_has_is_passed_as_none(make: Make) -> None:
    def reward(completions: list[str], tests: list[Any], **columns: Any) -> list[float | None]:
        assert tests == [None, None] and columns["answer"] == ["y", "y"]
        return [None, 1.0]

    runner = make(reward)
    runner.columns = ("tests", "answer")
    assert runner.score(PAIR[1:])[0].reward_parts["reward"] == (None, 1.0)
    assert runner.num_failures == 0


def test_the_event_loop_survives_a_reward_that_exits(make: Make) -> None:
    runner = make(async_exiting, async_lengths)
    for calls in (1, 2):
        assert runner.score(PAIR)[0].reward_parts == {"async_exiting": (None, None), "async_lengths": (1.0, 2.0)}
        assert runner.failures == {("async_exiting", "raised"): calls}


def test_calls_and_useful_calls_are_counted(make: Make) -> None:
    """A call of which anything could be used has worked."""
    runner = make(raising, LoadedReward("partly", lambda **columns: [1.0, "x", None, None]))
    runner.score(PAIR)
    assert runner.num_calls == {"raising": 1, "partly": 1} and +runner.num_useful_calls == {"partly": 1}
    assert runner.num_failures == 2 and "KeyError" in runner.last_failures["raising"]


def test_a_sum_beyond_the_largest_total_is_refused_with_its_terms(make: Make) -> None:
    large = [LoadedReward(name, lambda **columns: [1e308] * 4) for name in ("large", "too")]
    runner = make(*large)
    with pytest.raises(RewardError, match=r"within 1e\+18 and .*: large 1e\+308 x 1, too 1e\+308 x 1; scale"):
        runner.score(PAIR)


def test_functions_receive_trl_s_arguments(make: Make) -> None:
    seen: dict[str, Any] = {}

    def spy(prompts: list[Any], completions: list[Any], completion_ids: list[Any], **columns: Any) -> list[float]:
        seen.update(columns, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [0.0] * len(prompts)

    make(spy).score(PAIR)
    assert seen == {
        "prompts": ["q1", "q1", "q2", "q2"],
        "completions": ["a", "bb", "ccc", "dddd"],
        "completion_ids": [[1], [2], [3], [4]],
        "answer": ["x", "x", "y", "y"],
        "only": ["here", "here", None, None],
    }


def test_a_chat_prompt_has_chat_completions(make: Make) -> None:
    chat: list[Message] = [{"role": "user", "content": "q"}]

    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        assert prompts == [chat, "q"]
        return [float(completions == [[{"role": "assistant", "content": "a"}], "a"])] * 2

    assert [r.rewards for r in make(reward).score([rollout(chat, ["a"]), rollout("q", ["a"])])] == [(1.0,), (1.0,)]


def test_options_are_passed_and_replace_a_column_of_the_same_name(make: Make) -> None:
    def reward(completions: list[str], answer: Any, scale: float = 1.0) -> list[float]:
        return [scale if answer == "fixed" else 0.0] * len(completions)

    loaded = LoadedReward("reward", reward, options={"scale": 3.0, "answer": "fixed"})
    assert make(loaded).score(PAIR)[0].rewards == (3.0, 3.0)


def test_changes_that_a_function_makes_to_its_arguments_reach_no_other_function(make: Make) -> None:
    def vandal(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        count = len(completions)
        completions.clear()
        answer.clear()
        return [0.0] * count

    def reader(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        return [float(len(completions) == len(answer) == 4)] * 4

    assert make(vandal, reader).score(PAIR)[0].reward_parts["reader"] == (1.0, 1.0)


class Judge:
    async def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)


def late(completions: list[str], **columns: Any) -> Any:
    return async_lengths(completions=completions)


@pytest.mark.parametrize(("reward", "name", "first"), [(async_lengths, "async_lengths", 1.0), (late, "late", 1.0)])
def test_asynchronous_functions_are_awaited(make: Make, reward: Any, name: str, first: float) -> None:
    runner = make(reward, Judge())
    for _ in range(2):
        parts = runner.score(PAIR)[0].reward_parts
        assert parts == {name: (1.0, 2.0), "Judge": (1.0, 1.0)}
    assert runner.num_failures == 0


def test_asynchronous_functions_run_concurrently(make: Make) -> None:
    """Each waits for the other."""
    events = [threading.Event(), threading.Event()]

    def waiting(own: int) -> Any:
        async def reward(completions: list[str], **columns: Any) -> list[float]:
            events[own].set()
            met = await asyncio.to_thread(events[1 - own].wait, 10)
            return [float(met)] * len(completions)

        return reward

    assert make(waiting(0), waiting(1)).score(PAIR)[0].rewards == (2.0, 2.0)


def test_the_event_loop_lives_on_between_calls(make: Make) -> None:
    loops = []

    async def reward(completions: list[str], **columns: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    runner = make(reward)
    runner.score(PAIR)
    runner.score(PAIR)
    assert loops[0] is loops[1]


@pytest.mark.parametrize(
    "values",
    [
        (1, 2, 3, 4), [True, False, True, True], torch.tensor([1.0, 2.0, 3.0, 4.0]), [torch.tensor(1.0)] * 4,
        [torch.tensor([1.0])] * 4, np.array([True, False, True, True]), [np.bool_(True)] * 4, [np.float16(0.5)] * 4,
        [decimal.Decimal("0.5")] * 4, [fractions.Fraction(1, 4)] * 4,
        pd.Series([1.0, 2.0, 3.0, 4.0], index=[4, 5, 6, 7]),
    ],
)
def test_numbers_of_python_numpy_and_torch_are_read(make: Make, values: Any) -> None:
    runner = make(lambda completions, **columns: values)
    first, second = (float(value) for value in list(values)[:2])
    assert runner.score(PAIR)[0].rewards == (first, second)
    assert runner.num_failures == 0


def raising(**columns: Any) -> list[float]:
    raise KeyError("the sky")


def exiting(**columns: Any) -> list[float]:
    raise SystemExit(3)


def needing(completions: list[str], gold: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def interrupting(**columns: Any) -> list[float]:
    raise KeyboardInterrupt


async def async_exiting(**columns: Any) -> list[float]:
    raise SystemExit(3)


async def async_interrupting(**columns: Any) -> list[float]:
    raise KeyboardInterrupt


async def async_raising(**columns: Any) -> list[float]:
    raise KeyError("the sky")


async def cancelled(**columns: Any) -> list[float]:
    raise asyncio.CancelledError


FAILING = [
    (raising, "raised", "KeyError: 'the sky'"),
    (async_raising, "raised", "KeyError: 'the sky'"),
    (exiting, "raised", "SystemExit: 3"),
    (interrupting, "raised", "KeyboardInterrupt"),
    (async_exiting, "raised", "SystemExit: 3"),
    (async_interrupting, "raised", "KeyboardInterrupt"),
    (cancelled, "raised", "was cancelled"),
    (needing, "missing column", "requires gold, and the dataset has only answer, only"),
    (lambda **columns: [1.0] * 3, "wrong count", "must return 4 values.*returned 3"),
    (lambda **columns: 1.0, "not a list", "returned float"),
    (lambda **columns: None, "not a list", "returned NoneType"),
    (lambda **columns: torch.tensor(1.0), "not a list", "returned Tensor"),
    (lambda **columns: {1.0, 2.0, 3.0, 4.0}, "not a list", "returned set"),
    (lambda **columns: (x for x in (1.0, 2.0, 3.0, 4.0)), "not a list", "returned generator"),
    (lambda **columns: "1234", "not a list", "returned str"),
    (lambda **columns: np.ones((4, 1)), "not a number", r"returned \[1.0\] \(list\)"),
]


@pytest.mark.parametrize(("reward", "kind", "named"), FAILING)
def test_a_failed_call_is_reported_and_counted_and_the_run_goes_on(
    make: Make, reward: Any, kind: str, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    runner = make(LoadedReward("bad", reward), lengths)
    with caplog.at_level(logging.WARNING):
        scored = runner.score(PAIR)
    assert [r.rewards for r in scored] == [(1.0, 2.0), (3.0, 4.0)]
    assert [r.reward_parts["bad"] for r in scored] == [(None, None)] * 2
    assert runner.failures == {("bad", kind): 1} and runner.num_failures == 1
    (record,) = caplog.records
    for expected in (f"reward 'bad' failed \\({kind}\\)", named, "prompt 'q1', completion 'a'", "of at most 10"):
        assert re.search(expected, record.getMessage())


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (math.nan, "not finite"), (-math.inf, "not finite"), ("1", "not a number"), ([1.0], "not a number"),
        (1j, "not a number"), (decimal.Decimal("1e999"), "not finite"), (10**400, "not finite"),
        (decimal.Decimal("sNaN"), "not a number"),
    ],
)
def test_an_unreadable_value_costs_its_own_completion_only(
    make: Make, value: Any, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    runner = make(LoadedReward("bad", lambda **columns: [1.0, 2.0, value, value]))
    with caplog.at_level(logging.WARNING):
        scored = runner.score(PAIR)
    assert scored[0].rewards == (1.0, 2.0)
    assert scored[1].reward_parts["bad"] == (None, None) and same(scored[1].rewards, (math.nan, math.nan))
    assert runner.failures == {("bad", kind): 1}
    assert "sample 2: prompt 'q2', completion 'ccc'" in caplog.text


def test_a_hanging_function_is_abandoned_and_the_next_call_works(make: Make) -> None:
    release = threading.Event()
    hang = iter([True, False])

    def reward(completions: list[str], **columns: Any) -> list[float]:
        if next(hang):
            release.wait()
        return [1.0] * len(completions)

    runner = make(reward, lengths, time_limit_s=SHORT_S)
    try:
        assert runner.score(PAIR)[0].reward_parts == {"reward": (None, None), "lengths": (1.0, 2.0)}
        assert runner.failures == {("reward", "timeout"): 1}
        assert runner.score(PAIR)[0].reward_parts["reward"] == (1.0, 1.0)
    finally:
        release.set()


def test_a_hanging_asynchronous_function_is_cancelled(make: Make) -> None:
    cancelled = threading.Event()

    async def reward(**columns: Any) -> list[float]:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError

    runner = make(reward, async_lengths, time_limit_s=SHORT_S)
    assert runner.score(PAIR)[0].reward_parts["reward"] == (None, None)
    assert runner.failures["reward", "timeout"] == 1
    assert cancelled.wait(10)


def test_a_blocked_event_loop_is_replaced_for_the_next_call(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignlab.rollout.background._GRACE_S", SHORT_S)
    release = threading.Event()
    block = iter([True, False])

    async def reward(completions: list[str], **columns: Any) -> list[float]:
        if next(block):
            release.wait()
        return [1.0] * len(completions)

    runner = make(reward, time_limit_s=SHORT_S)
    try:
        runner.score(PAIR)
        assert runner.failures == {("reward", "timeout"): 1}
        assert runner.score(PAIR)[0].rewards == (1.0, 1.0)
    finally:
        release.set()


def test_more_failures_than_the_limit_stop_the_run_with_their_counts(make: Make) -> None:
    runner = make(raising, LoadedReward("short", lambda **columns: []), max_failures=3)
    runner.score(PAIR)
    with pytest.raises(RewardError, match=r"failed 4 times: raising raised x2, short wrong count x2; .*Last: .*'q1'"):
        runner.score(PAIR)


def test_a_limit_of_0_failures_stops_at_the_first(make: Make) -> None:
    with pytest.raises(RewardError, match="may fail 0 times"):
        make(raising, max_failures=0).score(PAIR)


def test_long_samples_are_clipped_in_reports(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make(raising).score([rollout("q" * 5000, ["a" * 5000])])
    assert len(caplog.records[0].getMessage()) < 1000


def test_rewards_with_the_same_name_get_numbers(make: Make) -> None:
    runner = make(lengths, lengths)
    assert runner.names == ("lengths", "lengths_2")
    assert make(lengths, lengths, LoadedReward("lengths_2", even)).names == ("lengths", "lengths_3", "lengths_2")
    assert runner.score(PAIR)[0].reward_parts == {"lengths": (1.0, 2.0), "lengths_2": (1.0, 2.0)}


def test_scoring_no_rollouts_returns_no_rollouts(make: Make) -> None:
    runner = make(raising)
    assert runner.score([]) == []
    assert runner.score([rollout("q", [])]) == [rollout("q", [])]
    assert runner.num_failures == 0


def test_shipped_rewards_score_together(make: Make) -> None:
    settings = [
        RewardSettings(name="exact_match"),
        RewardSettings(name="regex_format", weight=0.5, options={"pattern": r"\w+"}),
        RewardSettings(name="length", weight=0.1, options={"min_tokens": 5}),
    ]
    runner = make(*settings)
    (scored,) = runner.score([rollout("q", ["4", "no way"], answer="4")])
    assert scored.rewards == pytest.approx((1.5 + 0.0875, 0.0875))
    assert runner.num_failures == 0


def test_close_ends_the_event_loops_thread(make: Make) -> None:
    runner = make(async_lengths)
    runner.score(PAIR)
    assert any(thread.name == "alignlab-reward-loop" for thread in threading.enumerate())
    runner.close()
    assert not any(thread.name == "alignlab-reward-loop" for thread in threading.enumerate())
    assert runner.score(PAIR)[0].rewards == (1.0, 2.0)


class Failing(InlineReward):
    def __init__(self, error: AlignlabError) -> None:
        self.__name__ = "failing"
        self.error = error

    def __call__(self, **_: Any) -> list[float]:
        raise self.error


@pytest.mark.parametrize("kind", [DiskError, JudgeError])
def test_a_full_disk_or_a_judge_without_answers_ends_the_scoring(kind: type[AlignlabError], make: Make) -> None:
    runner = make(Failing(kind("answers.sqlite cannot be written")))
    with pytest.raises(kind, match=r"answers\.sqlite"):
        runner.score(PAIR)
    assert not runner.failures


def test_a_reward_that_is_not_finite_is_a_failed_call(make: Make) -> None:
    runner = make(Failing(NumericsError("the rewards are nan")))
    runner.score(PAIR)
    assert runner.failures == {("failing", "not finite"): 1}

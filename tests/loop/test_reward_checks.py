"""Rewards that cannot work and runs that learn nothing: refused, stopped or warned of, never a success."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.config.trainers import OnlineDPOConfig, PPOConfig
from alignlab.errors import ConfigError, NothingLearntError, RewardError
from alignlab.trainers.grpo import GRPOTrainer
from alignlab.trainers.online_dpo import OnlineDPOTrainer
from alignlab.trainers.ppo import PPOTrainer
from alignlab.types import Rollout
from tests.settings import merged
from tests.trainers.conftest import even_ids

Make = Callable[..., Any]
NAN = math.nan


@pytest.fixture
def make(make_model: Make, make_config: Make, tokenizer: Any, rows: Any) -> Make:
    def build(reward: Any, data: Any = None, callbacks: Any = (), eval_data: Any = None, **changes: Any) -> GRPOTrainer:
        return GRPOTrainer(
            make_model(), reward, make_config(**changes), rows if data is None else data, tokenizer=tokenizer,
            callbacks=callbacks, eval_dataset=eval_data,
        )

    return build


def constant(*, completions: Any, **_: Any) -> list[float]:
    return [0.0] * len(completions)


def silent(*, completions: Any, **_: Any) -> list[None]:
    return [None] * len(completions)


def misspelt(*, completions: Any, answer: Any, **_: Any) -> list[float]:
    return [float(text == right.strpi()) for text, right in zip(completions, answer, strict=True)]


def rewarded(rollout: Rollout, *rewards: float) -> Rollout:
    return replace(rollout, rewards=rewards)


def cut(rollout: Rollout, *reasons: str) -> Rollout:
    completions = [replace(c, finish_reason=r) for c, r in zip(rollout.completions, reasons, strict=True)]
    return replace(rollout, completions=tuple(completions))


def test_missing_column_is_refused_before_anything_is_generated(make: Make, rows: Any) -> None:
    def needy(completions: Any, ground_truth: Any) -> list[float]:
        raise AssertionError

    with pytest.raises(ConfigError, match="'needy' requires ground_truth, and the training data has only answer"):
        make(needy)
    trainer = make(even_ids, eval_data=[{"prompt": "ab"}], num_steps=1)
    scorer = replace(trainer.held_out.scorer, function=needy)
    trainer.held_out = replace(trainer.held_out, scorer=scorer)
    with pytest.raises(ConfigError, match="requires ground_truth, and the evaluation data has only no columns"):
        trainer.train()


def test_reward_that_fails_at_every_call_ends_the_run_at_its_third_call(make: Make) -> None:
    seen: list[int] = []
    trainer = make([even_ids, misspelt], num_steps=6, callbacks=[lambda _, step, __: seen.append(step)])
    with pytest.raises(RewardError, match=r"'misspelt' has failed at each of its 3 calls; .* no attribute 'strpi'"):
        trainer.train()
    assert seen == [1, 2]


def test_failures_of_a_reward_that_has_worked_once_are_tolerated(make: Make) -> None:
    calls: list[int] = []

    def failing_later(**columns: Any) -> list[float]:
        calls.append(1)
        return even_ids(**columns) if len(calls) == 1 else misspelt(**columns)

    result = make(failing_later, num_steps=5).train()
    assert result.num_steps == 5 and result.metrics["reward_failures"] == 4 and result.verdict.learnt


def test_run_without_any_reward_ends_with_an_error_and_a_saved_model(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(NothingLearntError, match="no completion got") as error:
        make(silent).train()
    result = error.value.result
    assert result.num_steps == 4 and result.metrics["unrewarded_frac"] == 1 and result.model_path.is_dir()
    assert json.loads((tmp_path / "run" / "report.json").read_text())["learnt"] is False
    messages = [record.getMessage() for record in caplog.records]
    assert sum("8 of 8 completions of a step have no reward" in text for text in messages) == 1
    assert sum("step 3: the last 3 steps taught nothing" in text for text in messages) == 1
    with pytest.raises(NothingLearntError, match="in 4 steps"):
        make(silent).train(resume=True)


def test_no_reward_over_all_prompts_and_many_completions_ends_the_run(make: Make) -> None:
    trainer = make(silent, num_steps=9, num_prompts=4, group_size=32)
    with pytest.raises(RewardError, match=r"none of 256 completions .* over all 8 prompts .* 'silent' gave None"):
        trainer.train()
    assert trainer.step == 2


def test_run_with_equal_rewards_has_learnt_nothing_and_warns(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        result = make(constant, num_steps=3).train()
    assert result.metrics["informative_frac"] == 0 and result.metrics["trainable_frac"] == 1
    assert result.verdict.learnt is False
    assert "the last 3 steps taught nothing: every completion got the same reward, 0" in caplog.text
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["learnt"] is False and report["reason"] == result.verdict.reason


def test_verdict_of_a_resumed_run_counts_the_steps_before(make: Make) -> None:
    make(even_ids, num_steps=1).train()

    def mended(**columns: Any) -> list[float]:
        return constant(**columns)

    mended.__name__ = even_ids.__name__  # the same reward, of another source
    result = make(mended, num_steps=3).train(resume=True)
    assert result.verdict.learnt, "the first step had signal"


def test_two_tasks_with_one_reward_each_have_separate_means(make: Make, rows: Any) -> None:
    def of(task: str) -> Any:
        def reward(completion_ids: Any, task: Any, **_: Any) -> list[float | None]:
            rows = zip(completion_ids, task, strict=True)
            return [float(ids[0] % 2) if name == rewarded_task else None for ids, name in rows]

        rewarded_task, reward.__name__ = task, task
        return reward

    seen: list[dict[str, float]] = []
    data = [row | {"task": ("math", "code")[i % 2]} for i, row in enumerate(rows)]
    trainer = make([of("math"), of("code")], data, [lambda _, __, m: seen.append(m)], num_steps=12, num_prompts=1)
    assert trainer.train().num_steps == 12 and trainer.source.rewards.num_failures == 0
    tasks = [{name.removeprefix("reward/") for name in metrics if name.startswith("reward/")} for metrics in seen]
    assert all(len(names) == 1 for names in tasks) and set.union(*tasks) == {"math", "code"}
    for names, metrics in zip(tasks, seen, strict=True):
        assert metrics["unrewarded_frac"] == 0 and metrics["reward"] == metrics[f"reward/{min(names)}"]
        assert ("accuracy" in metrics) == (names == {"math"})
        assert metrics[f"applied_frac/{min(names)}"] == 1
        assert metrics[f"applied_frac/{min({'math', 'code'} - names)}"] == 0


def test_rows_without_the_column_of_a_reward_get_none(make: Make, rows: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A step may consist of such rows."""

    def first_id(completion_ids: Any, tests: Any, **_: Any) -> list[float | None]:
        return [None if test is None else float(ids[0]) for ids, test in zip(completion_ids, tests, strict=True)]

    data = [row if i % 2 else row | {"tests": "x"} for i, row in enumerate(rows)]
    trainer = make(first_id, data, num_steps=8, num_prompts=1)
    assert "'tests', which 4 of 8 rows of the training data do not have" in caplog.text
    assert trainer.train().num_steps == 8 and trainer.source.rewards.num_failures == 0


def test_weight_of_a_callable_counts_in_the_total(make: Make) -> None:
    trainer = make([(even_ids, 0.5), (constant, 2.0)])
    for rollout in trainer.source.collect(1).rollouts:
        assert rollout.rewards == tuple(0.5 * value for value in rollout.reward_parts["even_ids"])


def test_rewards_with_weights_of_0_alone_are_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"the weight of each reward \(even_ids, constant\) is 0"):
        make([(even_ids, 0.0), (constant, 0.0)])
    make([(even_ids, 0.0), constant])


def test_signal_groups_of_grpo(make: Make) -> None:
    trainer = make(even_ids, mask_truncated=True)
    rollout, *_ = trainer.source.collect(1).rollouts
    whole = cut(rollout, *["stop"] * 4)
    groups = [
        rewarded(whole, 1.0, 0.0, 0.0, 0.0),
        rewarded(whole, 0.3, 0.3, 0.3, 0.3),
        rewarded(whole, NAN, NAN, 1.0, 0.0),
        rewarded(whole, NAN, NAN, NAN, 1.0),  # a single reward has no baseline
        rewarded(cut(rollout, "length", "stop", "stop", "stop"), 1.0, 0.0, 0.0, 0.0),  # its baseline is of all four
        rewarded(cut(rollout, "length", "length", "length", "length"), 1.0, 0.0, 0.0, 0.0),
    ]
    assert trainer.algorithm.signal_groups(groups).tolist() == [True, False, True, False, True, False]


def test_groups_of_equal_rewards_have_signal_under_a_step_baseline_where_groups_differ(make: Make) -> None:
    trainer = make(even_ids, recipe="reinforce_pp")
    rollout, *_ = trainer.source.collect(1).rollouts
    low, high = rewarded(rollout, 0.0, 0.0, 0.0, 0.0), rewarded(rollout, 1.0, 1.0, 1.0, 1.0)
    assert trainer.algorithm.signal_groups([low, high]).tolist() == [True, True]
    assert trainer.algorithm.signal_groups([low, low]).tolist() == [False, False]


def test_penalty_of_long_completions_is_signal(make: Make) -> None:
    trainer = make(even_ids, overlong_buffer_tokens=5)
    rollout, *_ = trainer.source.collect(1).rollouts
    sized = [replace(c, token_ids=(5,) * n) for c, n in zip(rollout.completions, (1, 1, 6, 6), strict=True)]
    same = rewarded(replace(rollout, completions=tuple(sized)), 0.0, 0.0, 0.0, 0.0)
    assert trainer.algorithm.signal_groups([same]).tolist() == [True]


def test_signal_groups_of_ppo(make_model: Make, tokenizer: Any, rows: Any, tmp_path: Path) -> None:
    def trainer(**changes: Any) -> PPOTrainer:
        base: dict[str, Any] = {"output_dir": tmp_path, "num_prompts": 2, "critic": {"form": "model"}, "num_steps": 4}
        return PPOTrainer(make_model(), even_ids, PPOConfig(**merged(base, changes)), rows, tokenizer=tokenizer)

    two = trainer(sampling={"max_new_tokens": 4})
    first, second = two.source.collect(1).rollouts
    assert two.algorithm.signal_groups([rewarded(first, 0.0), rewarded(second, 1.0)]).tolist() == [True, True]
    assert two.algorithm.signal_groups([rewarded(first, 0.5), rewarded(second, 0.5)]).tolist() == [False, False]
    assert two.algorithm.signal_groups([rewarded(first, 0.5), rewarded(second, NAN)]).tolist() == [False, False]
    single = trainer(num_prompts=1, sampling={"max_new_tokens": 4})
    assert single.algorithm.signal_groups([rewarded(first, 0.5)]).tolist() == [True], "its baseline is the critic alone"


def test_signal_groups_of_online_dpo(make_model: Make, tokenizer: Any, rows: Any, tmp_path: Path) -> None:
    config = OnlineDPOConfig(
        output_dir=tmp_path / "run", num_steps=2, num_prompts=2, sampling={"max_new_tokens": 4}, trackers=()
    )
    trainer = OnlineDPOTrainer(make_model(), constant, config, rows, tokenizer=tokenizer)
    rollout, *_ = trainer.source.collect(1).rollouts
    groups = [rewarded(rollout, 0.0, 1.0), rewarded(rollout, 1.0, 1.0), rewarded(rollout, NAN, 1.0)]
    assert trainer.algorithm.signal_groups(groups).tolist() == [True, False, False]
    with pytest.raises(NothingLearntError, match="every completion got the same reward, 0") as error:
        trainer.train()
    result = error.value.result
    assert result.verdict.learnt is False and result.metrics["empty_updates"] == 2


def test_advantages_are_computed_from_the_rewards_that_exist() -> None:
    """By hand: mean 1/2 and unbiased deviation sqrt(1/2) of 0 and 1."""
    from alignlab.functional.advantages import group_normalized

    rewards = torch.tensor([[NAN, 0.0, 1.0], [NAN, NAN, 3.0], [NAN, NAN, NAN]])
    expected = 0.5 / (0.5**0.5 + 1e-4)
    assert group_normalized(rewards).flatten().tolist() == pytest.approx([0, -expected, expected, 0, 0, 0, 0, 0, 0])

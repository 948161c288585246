"""The scorer of an evaluation that is found by name: in a process of its own it does the run no harm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from alignlab.config.rollout import RolloutSettings, SamplingSettings
from alignlab.config.run import EvaluationSettings
from alignlab.errors import ConfigError, RewardError
from alignlab.loop.held_out import HeldOutProblems, held_out_problems
from alignlab.types import Prompt
from tests.evaluation.test_evaluation import ScriptedEngine

SCORER = "tests.scoring.isolated_rewards.misbehaves_by_row"


def problems(how: str, **settings: Any) -> HeldOutProblems:
    evaluation = EvaluationSettings(scorer=SCORER, scorer_run_in="process", num_samples=1, **settings)
    held_out = held_out_problems(evaluation, (), SamplingSettings(), RolloutSettings(), needed=True)
    return replace(held_out, prompts=[Prompt((1, 2), "problem 0", 0, {"how": how})])


@pytest.mark.parametrize(
    ("how", "settings", "kind"),
    [
        ("exit", {}, "exited"),
        ("memory", {"scorer_memory_limit_gib": 2.0}, "out of memory"),
        ("hang", {"scorer_time_limit_s": 0.5}, "timeout"),
    ],
)
def test_a_scorer_that_exits_hangs_or_fills_memory_is_a_named_failure(
    how: str, settings: Any, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RewardError, match=rf"the scorer of an evaluation must not fail.*{kind}"):
        problems(how, **settings).evaluate(ScriptedEngine(), seed=0)
    assert capfd.readouterr() == ("", "")


def test_what_a_scorer_prints_is_not_shown_and_said(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    held_out = problems("-")
    result = held_out.evaluate(ScriptedEngine(), seed=0)
    assert result is not None and result.greedy == 1.0
    scorer: Any = held_out.scorer
    process = scorer.function.borrow_process()
    process.end()  # all that it has printed is read then
    scorer.function.return_process(process)
    held_out.evaluate(ScriptedEngine(), seed=0)
    assert "'misbehaves_by_row' prints" in caplog.text and "printed by the reward" in caplog.text
    assert capfd.readouterr() == ("", "")


def test_the_place_of_a_scorer_that_is_not_named_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"scorer_run_in .*must be left out where no scorer is named"):
        EvaluationSettings(scorer_run_in="process")
    with pytest.raises(ConfigError, match=r"scorer_memory_limit_gib .*add scorer_run_in: process"):
        EvaluationSettings(scorer="exact_match", scorer_memory_limit_gib=1.0)

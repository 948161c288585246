import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from alignlab.config.rollout import SamplingSettings
from alignlab.errors import ConfigError, RewardError
from alignlab.evaluation.comparison import MeasuredPolicy, comparison_table, difference
from alignlab.evaluation.evaluate import evaluate
from alignlab.evaluation.results import EvaluationResult
from alignlab.rollout.engine import RolloutEngine
from alignlab.scoring.loading import LoadedReward
from alignlab.types import Completion, Prompt, Rollout, SamplingParams

GREEDY = {0: "it is 4", 1: "6", 2: "9"}
SAMPLED = {0: ["4", "it is 4", "5", "4 "], 1: ["6", "7", "8", "9"], 2: ["1", "2", "3", "4"]}
SETTINGS = SamplingSettings(temperature=0.7, max_new_tokens=8)


def said(text: str) -> Completion:
    """A completion of a token a word."""
    n = len(text.split())
    return Completion.of((1,) * n, text)


class ScriptedEngine:
    """Says what it is told to, and remembers how it was asked."""

    policy_version = 0

    def __init__(self) -> None:
        self.asked: list[SamplingParams] = []

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        self.asked.append(sampling)
        rollouts = []
        for prompt in prompts:
            texts = [GREEDY[prompt.index]] if sampling.temperature == 0 else SAMPLED[prompt.index][: sampling.n]
            rollouts.append(Rollout(prompt, tuple(said(t) for t in texts)))
        return rollouts

    def update_weights(self, policy_version: int) -> None:
        raise AssertionError("an evaluation leaves the weights alone")


def problems(answers: Mapping[int, Any] | None = None) -> list[Prompt]:
    answers = {0: 4, 1: "6", 2: "8"} if answers is None else answers
    return [Prompt((1, 2), f"problem {i}", i, {"answer": answer}) for i, answer in answers.items()]


def last_number(prompts: list[str], completions: list[str], answer: list[Any], **columns: Any) -> list[float]:
    """Full marks for the last number, half for a number that is one too large."""
    said = [int(completion.split()[-1]) for completion in completions]
    return [1.0 if n == int(a) else 0.5 if n == int(a) + 1 else 0.0 for n, a in zip(said, answer, strict=True)]


def run(engine: RolloutEngine, scorer: Any = last_number, **options: Any) -> EvaluationResult:
    arguments: dict[str, Any] = {"num_samples": 4, "seed": 3, "pass_at": (1, 2)} | options
    prompts = arguments.pop("prompts", problems())
    return evaluate(engine, prompts, LoadedReward("last_number", scorer), sampling=SETTINGS, **arguments)


def test_accuracies_by_hand() -> None:
    result = run(ScriptedEngine())
    # Greedy: "it is 4" and "6" are right; "9" for 8 is worth a half, and so is wrong.
    assert result.greedy == pytest.approx(2 / 3)
    assert result.strict_greedy == pytest.approx(1 / 3)
    # Sampled: 3 + 1 + 0 of 12; "it is 4" is not strictly the answer, "4 " is.
    assert result.sampled == pytest.approx(4 / 12)
    assert result.strict_sampled == pytest.approx(3 / 12)
    # pass@2 = 1 - C(n - c, 2) / C(n, 2) = 1 - 0/6, 1 - 3/6, 1 - 6/6
    assert result.pass_at == pytest.approx({1: 4 / 12, 2: (1.0 + 0.5 + 0.0) / 3})
    assert (result.num_problems, result.num_samples) == (3, 4)
    # "it is 4" is three tokens here, every other completion one.
    assert result.greedy_tokens == pytest.approx(5 / 3) and result.sampled_tokens == pytest.approx(14 / 12)


def test_the_engine_answers_once_greedily_and_n_times_sampled() -> None:
    engine = ScriptedEngine()
    run(engine)
    greedy, sampled = engine.asked
    assert (greedy.n, greedy.temperature, greedy.max_new_tokens) == (1, 0.0, 8)
    assert (sampled.n, sampled.temperature, sampled.seed) == (4, 0.7, 3)


def test_the_result_holds_the_completions_texts() -> None:
    first, _, third = run(ScriptedEngine()).samples
    assert (first.prompt, first.answer, first.greedy, first.greedy_correct) == ("problem 0", "4", "it is 4", True)
    assert (first.sampled, first.num_correct) == (("4", "it is 4", "5", "4 "), 3)
    assert (third.greedy_correct, third.num_correct) == (False, 0)


def test_json_and_metrics() -> None:
    result = run(ScriptedEngine())
    loaded = json.loads(json.dumps(result.to_json()))
    assert loaded["pass_at"].keys() == {"1", "2"} and loaded["samples"][1]["greedy"] == "6"
    assert EvaluationResult.from_json(loaded) == result
    assert result.metrics() == {
        "eval/greedy": result.greedy,
        "eval/sampled": result.sampled,
        "eval/strict_greedy": result.strict_greedy,
        "eval/strict_sampled": result.strict_sampled,
        "eval/pass@1": result.pass_at[1],
        "eval/pass@2": result.pass_at[2],
    }


def test_without_an_answer_column_there_is_no_strict_accuracy() -> None:
    prompts = [Prompt((1,), "problem", 0, {"solution": 4})]
    result = run(ScriptedEngine(), lambda completions, **columns: [1.0] * len(completions), prompts=prompts)
    assert result.strict_greedy is None and result.strict_sampled is None and result.greedy == 1.0
    assert "eval/strict_greedy" not in result.metrics() and result.samples[0].answer is None


def test_an_async_scorer_and_its_options() -> None:
    async def scorer(completions: list[str], value: float = 0.0, **columns: Any) -> list[float | None]:
        return [value] * len(completions)

    reward = LoadedReward("constant", scorer, options={"value": 1.0})
    result = evaluate(ScriptedEngine(), problems(), reward, sampling=SETTINGS, num_samples=2, seed=0)
    assert (result.greedy, result.sampled, result.pass_at) == (1.0, 1.0, {1: 1.0})


def test_a_failing_scorer_is_an_error_and_not_a_zero(caplog: pytest.LogCaptureFixture) -> None:
    def broken(**columns: Any) -> list[float]:
        raise KeyError("oops")

    with caplog.at_level(logging.CRITICAL), pytest.raises(RewardError, match=r"must not fail.*'last_number'.*oops"):
        run(ScriptedEngine(), broken)


def on_even_answers(**given: Any) -> list[float | None]:
    """As `last_number`, but None for problem 1."""
    values = zip(last_number(**given), given["prompts"], strict=True)
    return [None if prompt == "problem 1" else value for value, prompt in values]


def test_accuracy_is_of_the_problems_that_the_scorer_applies_to() -> None:
    result = run(ScriptedEngine(), on_even_answers)
    # Problem 0: greedy right, 3 of 4 sampled; problem 2: greedy wrong, none sampled.
    assert (result.greedy, result.sampled) == (0.5, 3 / 8)
    assert (result.strict_greedy, result.strict_sampled) == (0.0, 2 / 8)
    assert result.pass_at == {1: 3 / 8, 2: 0.5}
    assert (result.num_problems, result.num_judged, result.judged) == (3, 2, 2)
    assert result.metrics()["eval/num_judged"] == 2
    verdicts = [(sample.greedy_correct, sample.num_correct) for sample in result.samples]
    assert verdicts == [(True, 3), (None, 0), (False, 0)]
    assert EvaluationResult.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_differences_are_of_the_problems_judged_for_both() -> None:
    whole, part = run(ScriptedEngine()), run(ScriptedEngine(), on_even_answers)
    assert difference(whole, part).greedy.value == 0 and difference(whole, part).num_lost == 0
    table = comparison_table([MeasuredPolicy("a", "a", part, 1, 1.0)])
    assert "2 of 3 problems" in str(table.title)


def test_a_scorer_that_applies_to_no_problem_is_an_error() -> None:
    def silent(completions: list[str], **columns: Any) -> list[float | None]:
        return [None] * len(completions)

    with pytest.raises(RewardError, match=r"last_number gave None for each of 3; choose another evaluation.scorer"):
        run(ScriptedEngine(), silent)


def test_a_scorer_whose_column_is_missing_is_refused_before_anything_is_generated() -> None:
    engine = ScriptedEngine()
    prompts = [Prompt((1,), "problem", 0, {"solution": 4})]
    with pytest.raises(ConfigError, match=r"requires answer, and the evaluation data has only solution"):
        run(engine, prompts=prompts)
    assert not engine.asked


def test_no_problems_and_impossible_k_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one problem"):
        run(ScriptedEngine(), prompts=[])
    with pytest.raises(ConfigError, match=r"pass_at holds 8, and each k must be from 1 to num_samples \(4\)"):
        run(ScriptedEngine(), pass_at=(1, 8))

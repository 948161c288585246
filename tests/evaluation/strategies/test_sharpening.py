from __future__ import annotations

import pytest

from alignlab.errors import ConfigError
from alignlab.evaluation.strategies.measured import (
    check_problems,
    check_samples,
    measure_strategies,
    powers_of_two,
)
from alignlab.evaluation.strategies.report import plot_strategies, strategies_table
from alignlab.evaluation.strategies.settings import parse_strategy
from alignlab.evaluation.strategies.sharpening import describe_sharpening, sharpening


def measured(problem, name, rights, words=("majority",)):
    problems = [
        problem([0 if value else i + 1 for i, value in enumerate(right)], right, row=row)
        for row, right in rights.items()
    ]
    return measure_strategies(name, problems, [parse_strategy(word) for word in words], [1, 2, 4], seed=0)


def test_the_gain_divides_by_what_the_first_model_could_say(problem):
    before = measured(problem, "before", {0: [1.0, 0.0, 0.0, 0.0], 1: [0.0] * 4, 2: [1.0] * 4})
    after = measured(problem, "after", {0: [1.0, 1.0, 1.0, 0.0], 1: [1.0, 1.0, 1.0, 0.0], 2: [1.0] * 4})
    result = sharpening(before, after)
    # Problem 0: 1/4 to 3/4, within reach; problem 1: 0 to 3/4, beyond it; problem 2 stays.
    assert result["gain"]["value"] == pytest.approx(5 / 12, abs=1e-3)
    assert result["gain_within_reach"]["value"] == pytest.approx(1 / 6, abs=1e-3)
    assert result["gain_beyond_reach"]["value"] == pytest.approx(1 / 4, abs=1e-3)
    assert result["gain"]["low"] <= result["gain"]["value"] <= result["gain"]["high"]
    # pass@1 of the second is 5/6; the first one's oracle ends at 2/3.
    assert result["matched_by"] == {"oracle": None, "majority": None} and result["oracle_crosses_at"] is None
    assert "none of the strategies; its pass@k stays below" in describe_sharpening(result)


def test_more_samples_of_the_first_model_reach_single_ones_of_the_second(problem):
    before = measured(problem, "before", {0: [1.0, 1.0, 0.0, 0.0], 1: [1.0, 0.0, 0.0, 0.0]})
    after = measured(problem, "after", {0: [1.0] * 4, 1: [0.0] * 4})
    result = sharpening(before, after)
    # Goal 1/2: the oracle has (1/2 + 1/4) / 2 at k = 1 and (5/6 + 1/2) / 2 at k = 2.
    assert result["matched_by"]["oracle"] == {"k": 2, "tokens": 2.0} and result["oracle_crosses_at"] == 2
    assert "oracle of 2 (2 tokens)" in describe_sharpening(result)


def test_problems_that_one_model_was_not_judged_on_are_left_out(problem):
    before = measured(problem, "before", {0: [1.0, 0.0, 0.0, 0.0], 1: [0.0] * 4})
    after = measured(problem, "after", {0: [1.0, 1.0, 0.0, 0.0], 2: [1.0] * 4})
    assert sharpening(before, after)["gain"]["value"] == 0.25


WORDS = ("majority", "best_of_n:reward=logprob", "weighted", "confidence:warmup=1", "adaptive:start=2", "calibrated")


def test_all_strategies_of_a_pool_side_by_side(problem, tmp_path):
    rights = {row: [float(row % 2), 1.0, 0.0, 0.0] for row in range(8)}
    both = [measured(problem, name, rights, WORDS) for name in ("before", "after")]
    names = [figure.strategy for figure in both[0].figures]
    assert list(dict.fromkeys(names)) == [
        "oracle", "majority", "best_of_n logprob", "weighted logprob", "confidence", "adaptive"
    ]  # fmt: skip
    assert [f.k for f in both[0].of("adaptive")] == [2, 4] and len(both[0].calibrations) == 1
    best = {f.k: f.accuracy for f in both[0].of("oracle")}
    assert all(f.accuracy <= best[f.k] + 3 * f.error + 1e-9 for f in both[0].figures)
    assert strategies_table(both).row_count == 2 * (5 * 3 + 2)
    assert both[0].to_json()["calibration"][0]["num_fitted"] == 4
    plot_strategies(both, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_default_sizes_end_with_the_pool():
    assert powers_of_two(1) == (1,) and powers_of_two(8) == (1, 2, 4, 8) and powers_of_two(6) == (1, 2, 4, 6)


@pytest.mark.parametrize(("ks", "message"), [((1, 9), "holds 9.*pool's 8 samples"), ((0,), "holds 0")])
def test_a_k_over_the_pool_is_refused(ks, message):
    with pytest.raises(ConfigError, match=message):
        check_samples([], ks, num_samples=8)


def test_too_few_samples_or_problems_for_a_strategy_are_refused():
    strategies = [parse_strategy("adaptive:start=4")]
    with pytest.raises(ConfigError, match=r"start is 4, and must be at most the largest k \(2\)"):
        check_samples(strategies, [1, 2], num_samples=8)
    with pytest.raises(ConfigError, match="needs at least 4, not 3"):
        check_problems(strategies, 3)
    with pytest.raises(ConfigError, match="must leave at least 2 of 3 problems"):
        check_problems([parse_strategy("calibrated")], 3)

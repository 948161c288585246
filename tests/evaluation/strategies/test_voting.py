from __future__ import annotations

import itertools
import math
from statistics import fmean

import pytest

from alignlab.errors import RewardError
from alignlab.evaluation.strategies.figures import Estimate, Figure, estimate_of, over_subsets
from alignlab.evaluation.strategies.settings import Weighted
from alignlab.evaluation.strategies.voting import (
    best_of_n,
    majority,
    oracle,
    weighted,
    weighted_value,
    weights_of,
)
from alignlab.functional.intervals import mean_interval

# Four samples: answer 0 twice and right, answer 1 once, none once.
ANSWERS, RIGHT = [0, 1, 0, None], [1.0, 0.0, 1.0, 0.0]


def test_the_oracle_and_the_majority_by_hand(problem):
    problems = [problem(ANSWERS, RIGHT, tokens=[2, 4, 6, 8]), problem([0, 0, 0, 0], [0.0] * 4, tokens=[1] * 4)]
    first, second = oracle(problems, [1, 2])
    assert first.values == pytest.approx((0.5, 0.0)) and second.values == pytest.approx((5 / 6, 0.0))
    # Pairs: 01 tie, 02 right, 0- right, 12 tie, 1- wrong, 2- right: (1/2 + 1 + 1 + 1/2 + 0 + 1) / 6
    assert majority(problems, [2])[0].values == pytest.approx((4 / 6, 0.0))
    # Two samples of 5 tokens on average, and two of 1.
    assert second.tokens == pytest.approx((10 + 2) / 2)


def test_the_best_by_a_reward_whose_best_is_wrong(problem):
    of_one = problem(ANSWERS, RIGHT, judge=[0.1, 0.9, 0.2, -math.inf])
    # Of the pairs without the second sample, only those with sample 0 or 2 are right: 02, 0-, 2-.
    assert best_of_n([of_one], [2, 4], "judge")[0].values == pytest.approx((0.5,))
    assert best_of_n([of_one], [2, 4], "judge")[1].values == (0.0,)


def test_equal_weights_vote_as_the_majority(problem):
    of_one = problem(ANSWERS, RIGHT, fair=[1.0] * 4)
    for k in range(1, 5):
        [by_weight], [by_count] = weighted([of_one], [k], Weighted(weight="fair"), 0), majority([of_one], [k])
        assert by_weight.values == pytest.approx(by_count.values)


def test_weights_decide(problem):
    heavy = problem(ANSWERS, RIGHT, judge=[0.1, 0.9, 0.2, 5.0])
    # 0.3 against 0.9; the silent sample has no vote.
    assert weighted([heavy], [4], Weighted(weight="judge"), 0)[0].values == (0.0,)
    unscored = problem(ANSWERS, RIGHT, judge=[0.1, -math.inf, 0.0, 0.0])
    assert weighted([unscored], [4], Weighted(weight="judge"), 0)[0].values == (1.0,)
    # exp(-1) + exp(-1) against exp(-0.1): 0.74 < 0.90
    by_logprob = problem(ANSWERS, RIGHT, logprobs=[[-1.0], [-0.1], [-1.0], [-0.1]])
    assert weighted([by_logprob], [4], Weighted(), 0)[0].values == (0.0,)


def test_scores_below_0_are_no_weights_and_their_sigmoids_are(problem):
    negative = problem(ANSWERS, RIGHT, judge=[-2.0, 0.0, -2.0, 0.0])
    with pytest.raises(RewardError, match=r"must be at least 0, and the reward judge gave -2; .*link=sigmoid"):
        weighted([negative], [4], Weighted(weight="judge"), 0)
    # 2 sigmoid(-2) = 0.24 against sigmoid(0) = 0.5
    assert weighted([negative], [4], Weighted(weight="judge", link="sigmoid"), 0)[0].values == (0.0,)
    assert weights_of(problem([0], [1.0], judge=[-1e9]), Weighted(weight="judge", link="sigmoid"))[0] < 1e-100


def test_equal_sums_share_and_no_votes_are_worth_nothing(problem):
    of_one = problem([0, 1, None], [1.0, 0.0, 0.0])
    assert weighted_value(of_one, [0, 1], [0.3, 0.3]) == 0.5
    assert weighted_value(of_one, [2], [1.0]) == 0.0


def test_all_subsets_where_they_are_few_and_random_ones_with_an_error_where_not():
    def first(subset: tuple[int, ...]) -> float:
        return float(min(subset))

    exact = over_subsets(6, 3, first, seed=0)
    assert exact == Estimate(fmean(min(s) for s in itertools.combinations(range(6), 3)), 0.0)
    estimate = over_subsets(30, 5, first, seed=0)
    truth = fmean(min(s) for s in itertools.combinations(range(30), 5))
    assert estimate.variance > 0 and abs(estimate.value - truth) < 4 * math.sqrt(estimate.variance)
    assert over_subsets(30, 5, first, seed=0) == estimate != over_subsets(30, 5, first, seed=1)


def test_the_variance_of_a_mean_by_hand():
    # Mean 3/4; variance of the values (9/16 + 3/16) / 3 = 1/4, of their mean a fourth of that.
    assert estimate_of([0.0, 1.0, 1.0, 1.0]) == pytest.approx((0.75, 1 / 16))
    assert estimate_of([1.0]) == (1.0, 0.0)


def test_a_figure_s_interval_and_error():
    figure = Figure.of("x", 2, [Estimate(0.0, 0.04), Estimate(1.0, 0.05), Estimate(0.5, 0.0)], 7.0)
    assert figure.accuracy == 0.5 and figure.error == pytest.approx(0.1)
    assert figure.interval == mean_interval([0.0, 1.0, 0.5])
    assert figure.to_json() == {
        "strategy": "x", "k": 2, "accuracy": 0.5, "low": 0.0, "high": 1.0, "tokens": 7.0, "error": 0.1
    }  # fmt: skip

from __future__ import annotations

import pytest

from alignlab.evaluation.strategies.adaptive import Curve, adaptive, allocation, curve, outcomes_of
from alignlab.evaluation.strategies.settings import Adaptive


def test_the_majority_after_each_sample_by_hand(problem):
    of_one = problem([0, 1, 1, None, 0], [1.0, 0.0, 0.0, 0.0, 1.0], tokens=[1, 2, 3, 4, 5])
    assert curve(of_one, [0, 1, 2, 3, 4], 2) == Curve(1, [1.0, 0.5, 0.0, 0.0, 0.5], [1, 3, 6, 10, 15])
    assert curve(of_one, [1, 2, 3], 2).level == 2
    assert curve(of_one, [3], 2).worth == [0.0]


def test_samples_go_where_they_gain():
    easy = Curve(2, [1.0, 1.0, 1.0, 1.0], [1, 2, 3, 4])  # agrees at once, and gains nothing
    hard = Curve(1, [0.0, 0.0, 0.4, 0.9], [1, 2, 3, 4])
    # 2 problems, k = 3: 2 samples to give beyond the first 2 each; the hard one takes both.
    assert allocation([easy, hard], 2, 3) == {2: 2, 1: 4}
    # Where only one is left to give, the shorter step is taken.
    assert allocation([easy, hard, easy, easy], 2, 2) == {2: 2, 1: 2}
    assert allocation([easy, easy], 2, 4) == {2: 2}, "samples that gain nothing are not drawn"


def test_a_level_of_several_problems_costs_each_of_them():
    hard = Curve(1, [0.0, 0.0, 0.5, 1.0], [1, 2, 3, 4])
    assert allocation([hard, hard, hard, hard], 2, 3) == {1: 3}


def test_what_is_learnt_on_one_half_is_used_on_the_other():
    gains = Curve(1, [0.0, 0.0, 0.0, 1.0], [1, 2, 3, 4])
    flat = Curve(1, [0.0, 0.0, 0.5, 0.0], [1, 2, 3, 4])
    # Of the flat one is learnt to stop after 3, of the other to go on to 4.
    assert outcomes_of([gains, flat], [0, 1], 2, 4) == [(0.0, 3), (0.0, 4)]
    # A level that the other half lacks gets k.
    assert outcomes_of([gains, Curve(2, [1.0] * 4, [1, 2, 3, 4])], [0, 1], 2, 3) == [(0.0, 3), (1.0, 3)]


def test_hard_problems_get_more_and_easy_ones_less(problem):
    # Easy: all agree and are right. Hard: only many samples show the majority.
    easy = [problem([0] * 12, [1.0] * 12) for _ in range(8)]
    hard = [problem([0, 1, 2, 3, 4, 5] + [6] * 6, [0.0] * 6 + [1.0] * 6) for _ in range(8)]
    [figure] = adaptive([*easy, *hard], [7], Adaptive(start=2, shuffles=16), 0)
    assert figure.k == 7 and figure.tokens <= 7.5
    assert set(figure.values[:8]) == {1.0}
    even = sum(curve(p, list(range(12)), 2).worth[6] for p in hard) / 8
    assert figure.accuracy > 0.9 and even < 1.0


def test_below_the_start_there_is_no_figure(problem):
    problems = [problem([0] * 4, [1.0] * 4) for _ in range(4)]
    assert [figure.k for figure in adaptive(problems, [1, 2, 4], Adaptive(start=2, shuffles=2), 0)] == [2, 4]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_seed_gives_the_same_figures(problem, seed):
    problems = [problem([0, 1, 0, 1], [1.0, 0.0, 1.0, 0.0]) for _ in range(4)]
    settings = Adaptive(start=2, shuffles=4)
    assert adaptive(problems, [3], settings, seed) == adaptive(problems, [3], settings, seed)

"""Each closed form is the mean over all subsets of the pool."""

from __future__ import annotations

import itertools
import random
from statistics import fmean

import pytest

from alignlab.functional.estimation import pass_at_k
from alignlab.functional.scaling import best_at_k, majority_at_k


def votes_of(answers: list[str | None], right: list[float]) -> tuple[list[int], list[float]]:
    by_answer: dict[str, list[float]] = {}
    for answer, value in zip(answers, right, strict=True):
        if answer is not None:
            by_answer.setdefault(answer, []).append(value)
    return [len(values) for values in by_answer.values()], [fmean(values) for values in by_answer.values()]


def majority_of(subset: tuple[int, ...], answers: list[str | None], right: list[float]) -> float:
    counts, values = votes_of([answers[i] for i in subset], [right[i] for i in subset])
    return fmean(v for c, v in zip(counts, values, strict=True) if c == max(counts)) if counts else 0.0


def best_of(subset: tuple[int, ...], scores: list[float], right: list[float]) -> float:
    best = max(scores[i] for i in subset)
    return fmean(right[i] for i in subset if scores[i] == best)


@pytest.mark.parametrize("seed", range(20))
def test_majority_is_the_mean_over_all_subsets(seed):
    draw = random.Random(seed)
    n = draw.randint(1, 8)
    answers = [draw.choice([None, "a", "b", "c", "d"]) for _ in range(n)]
    right = [0.0 if answer is None else float(draw.random() < 0.5) for answer in answers]
    counts, values = votes_of(answers, right)
    curve = majority_at_k(counts, values, num_silent=answers.count(None), max_k=n)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(range(n), k))
        assert curve[k - 1].item() == pytest.approx(fmean(majority_of(s, answers, right) for s in subsets), abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_the_best_is_the_mean_over_all_subsets(seed):
    draw = random.Random(seed)
    n = draw.randint(1, 8)
    scores = [draw.choice([-float("inf"), 0.0, 1.0, 2.0]) for _ in range(n)]
    right = [float(draw.random() < 0.5) for _ in range(n)]
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(range(n), k))
        assert best_at_k(scores, right, k) == pytest.approx(fmean(best_of(s, scores, right) for s in subsets))


def test_majority_by_hand():
    # a twice (right), b once: of the pairs aa, ab, ab the first is won, and two are ties, each worth a half.
    assert majority_at_k([2, 1], [1.0, 0.0], num_silent=0, max_k=3).tolist() == pytest.approx([2 / 3, 2 / 3, 1.0])
    # A silent sample does not vote: of a, b, silent, a pair with it is decided by the other one.
    assert majority_at_k([1, 1], [1.0, 0.0], num_silent=1, max_k=2).tolist() == pytest.approx([1 / 3, 0.5])
    assert majority_at_k([], [], num_silent=3, max_k=2).tolist() == [0.0, 0.0]


def test_the_best_by_the_scorer_itself_is_the_oracle():
    right = [1.0, 0.0, 0.0, 1.0, 0.0]
    for k in range(1, 6):
        assert best_at_k(right, right, k) == pytest.approx(pass_at_k(5, 2, k))
        assert best_at_k([0.0] * 5, right, k) == pytest.approx(2 / 5)  # of equal scores any may be taken


def test_a_pool_of_hundreds_stays_exact():
    # 300 of 500 samples are right and agree, each other answer is given once: more samples can only help.
    curve = majority_at_k([300, *[1] * 200], [1.0, *[0.0] * 200], num_silent=0, max_k=40)
    assert curve[0].item() == pytest.approx(0.6) and curve[39].item() == pytest.approx(1.0)
    assert bool((curve[2:] - curve[1:-1] >= -1e-12).all())


@pytest.mark.parametrize("k", [0, 4])
def test_a_k_outside_of_the_pool_is_refused(k):
    with pytest.raises(ValueError, match=f"k is {k}, and must lie between 1 and the pool's 3 samples"):
        best_at_k([1.0, 2.0, 3.0], [1.0, 0.0, 1.0], k)
    with pytest.raises(ValueError, match=f"k is {k}"):
        majority_at_k([2], [1.0], num_silent=1, max_k=k)


def test_inputs_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="values has 1 entries"):
        best_at_k([1.0, 2.0], [1.0], 1)
    with pytest.raises(ValueError, match="at most 1000"):
        majority_at_k([1001], [1.0], num_silent=0, max_k=1)

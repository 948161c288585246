from __future__ import annotations

import pytest

from alignlab.evaluation.strategies.confidence import confidence, replay, stopped_at, threshold_of, window_means
from alignlab.evaluation.strategies.settings import Confidence


def test_windows_by_hand():
    assert window_means([-1.0, -3.0, -5.0], 2) == [-2.0, -4.0]
    assert window_means([-1.0, -3.0], 5) == [-2.0]  # a shorter sample is one window
    assert window_means([], 5) == [-float("inf")]


def test_a_sample_stops_at_its_first_window_below_the_threshold():
    logprobs = [-1.0, -1.0, -3.0, -9.0, -1.0]
    assert stopped_at(logprobs, 2, -1.5) == 3  # windows -1, -2, -6, -5: the second ends with the third token
    assert stopped_at(logprobs, 2, -2.0) == 4
    assert stopped_at(logprobs, 2, -6.0) is None


@pytest.mark.parametrize(("keep_frac", "threshold"), [(1.0, -4.0), (0.75, -3.0), (0.5, -2.0), (0.3, -2.0), (0.1, -1.0)])
def test_the_threshold_is_what_a_fraction_keeps_to(keep_frac, threshold):
    assert threshold_of([-4.0, -1.0, -3.0, -2.0], keep_frac) == threshold


def test_of_one_warm_sample_the_others_stop_below_it(problem):
    # All samples agree with none: each is its own answer, so that nothing reaches the consensus.
    logprobs = [[-1.0, -1.0]] * 3
    settings = Confidence(window=1, warmup=1, keep_frac=1.0, consensus=1.0)
    [one, three] = confidence([problem([0, 1, 2], [1.0, 0.0, 0.0], logprobs=logprobs)], [1, 3], settings, 0)
    assert one.tokens == 2.0 and three.tokens == 2.0, "one answer alone has all the weight: sampling ends"
    settings = Confidence(window=1, warmup=2, keep_frac=1.0, consensus=1.0)
    [three] = confidence([problem([0, 1, 2], [1.0, 0.0, 0.0], logprobs=logprobs)], [3], settings, 0)
    assert three.tokens == 6.0 and three.values == pytest.approx((1 / 3,))  # equal weights share


def test_unsure_samples_are_cut_and_do_not_vote(problem):
    # Answer 0 is sure and right; answer 1 is unsure from its first token on.
    logprobs = [[-0.1] * 4, [-5.0] * 4, [-5.0] * 4, [-0.1] * 4]
    of_one = problem([0, 1, 1, 0], [1.0, 0.0, 0.0, 1.0], logprobs=logprobs)
    settings = Confidence(window=2, warmup=2, keep_frac=0.5, consensus=1.0)
    # Warm: a sure and an unsure sample, whole; exp(-0.1) against exp(-5). The next unsure one is cut at its first
    # window, of 2 tokens, and the last sure one is whole.
    assert replay(of_one, [0, 1, 2, 3], settings) == [(1.0, 4), (1.0, 8), (1.0, 10), (1.0, 14)]
    # Of two unsure ones the answer has all the weight: sampling ends there, and stays wrong.
    assert replay(of_one, [1, 2, 0, 3], settings) == [(0.0, 4), (0.0, 8), (0.0, 8), (0.0, 8)]
    # Without a threshold that they miss, unsure samples vote with less weight: 2 exp(-5) < exp(-0.1).
    loose = Confidence(window=2, warmup=2, keep_frac=1.0, consensus=1.0)
    assert replay(of_one, [0, 1, 2, 3], loose) == [(1.0, 4), (1.0, 8), (1.0, 12), (1.0, 16)]


def test_without_early_stop_all_is_sampled(problem):
    of_one = problem([0, 1, 0, 1], [1.0, 0.0, 1.0, 0.0], logprobs=[[-1.0] * 3] * 4)
    [figure] = confidence([of_one], [4], Confidence(warmup=4, keep_frac=1.0, consensus=1.0), 0)
    assert figure.tokens == 12.0 and figure.values == (0.5,) and figure.error == 0.0

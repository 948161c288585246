import random
from math import inf
from statistics import fmean, stdev

import pytest

from alignlab.functional.intervals import difference_interval, mean_interval, ratio_interval, wilson_interval


def test_wilson_by_hand():
    # p = 1/2, n = 4, z = 1.96: centre 1/2, half = 1.96 / (1 + 0.96) sqrt(1/16 + 0.06) = 0.3500
    low, high = wilson_interval(0.5, 4)
    assert (low, high) == pytest.approx((0.15, 0.85), abs=1e-3)
    # p = 0: [0, z^2 / (n + z^2)]
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 3.8415 / 13.8415), abs=1e-4)
    assert wilson_interval(1.0, 10) == pytest.approx((1 - 3.8415 / 13.8415, 1.0), abs=1e-4)


def test_more_items_and_lower_levels_make_it_narrower():
    def width(n, level=0.95):
        low, high = wilson_interval(0.3, n, level=level)
        return high - low

    assert width(10) > width(100) > width(1000) and width(10) > width(10, 0.5)


def test_the_bootstrap_is_near_the_normal_interval():
    draw = random.Random(0)
    values = [draw.random() for _ in range(400)]
    low, high = mean_interval(values)
    half = 1.96 * stdev(values) / 20
    assert (low, high) == pytest.approx((fmean(values) - half, fmean(values) + half), abs=0.005)
    assert mean_interval(values) == (low, high) and mean_interval(values, seed=1) != (low, high)


def test_equal_values_get_wilson_s_interval():
    assert mean_interval([1.0] * 8) == wilson_interval(1.0, 8)


def test_a_ratio_is_weighed_by_its_denominators():
    # One long item of ratio 1, many short ones of ratio 3: every resample lies between.
    low, high = ratio_interval([100.0, *[3.0] * 20], [100.0, *[1.0] * 20])
    assert 1.0 <= low < 160 / 120 < high <= 3.0
    assert ratio_interval([2.0, 4.0], [1.0, 2.0]) == (2.0, 2.0)


def test_a_difference_of_groups_is_near_the_normal_interval():
    draw = random.Random(0)
    first, second = [draw.gauss(3, 1) for _ in range(300)], [draw.gauss(1, 2) for _ in range(200)]
    low, high = difference_interval(first, second)
    middle = fmean(first) - fmean(second)
    half = 1.96 * (stdev(first) ** 2 / 300 + stdev(second) ** 2 / 200) ** 0.5
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=0.03)
    assert difference_interval(first, second) == (low, high) != difference_interval(first, second, seed=1)


def test_groups_of_a_difference_are_resampled_by_themselves():
    same = [1.0, 3.0] * 50
    low, high = difference_interval(same, same)
    assert low < -0.1 and high > 0.1, "the two groups do not draw the same items"
    assert difference_interval([5.0] * 3, [2.0] * 4) == (3.0, 3.0)


def test_resamples_without_a_denominator_are_infinite():
    assert ratio_interval([1.0, 1.0], [0.0, 1.0])[1] == inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson_interval(0.5, 0), "of at least 1"),
        (lambda: wilson_interval(1.5, 3), "fraction is 1.5"),
        (lambda: wilson_interval(0.5, 3, level=1.0), "level is 1.0"),
        (lambda: mean_interval([]), "values is empty"),
        (lambda: ratio_interval([1.0], [0.0]), "not all 0"),
        (lambda: difference_interval([1.0], []), "at least one item each"),
        (lambda: difference_interval([1.0], [1.0], level=0.0), "level is 0.0"),
    ],
)
def test_what_has_no_interval_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

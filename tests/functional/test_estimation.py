import itertools

import pytest

from alignlab.functional import estimation as estimators
from tests.reference import functional as twin

OF_CHANCE = 0.015  # three standard errors of a p-value of 1/2 from 9999 flips


@pytest.mark.parametrize("num_samples", range(1, 7))
def test_pass_at_k_equals_trying_every_choice(num_samples):
    for num_correct in range(num_samples + 1):
        outcomes = [True] * num_correct + [False] * (num_samples - num_correct)
        for k in range(1, num_samples + 1):
            expected = pytest.approx(twin.pass_at_k(outcomes, k), abs=1e-12)
            assert estimators.pass_at_k(num_samples, num_correct, k) == expected


def test_pass_at_1_is_the_accuracy_and_large_counts_are_fine():
    assert estimators.pass_at_k(4, 3, 1) == 0.75
    assert 0.99 < estimators.pass_at_k(10_000, 100, 1000) < 1.0


@pytest.mark.parametrize(("num_samples", "num_correct", "k"), [(4, 1, 0), (4, 1, 5), (4, 5, 1), (4, -1, 1)])
def test_impossible_numbers_are_refused(num_samples, num_correct, k):
    with pytest.raises(ValueError, match="must lie between"):
        estimators.pass_at_k(num_samples, num_correct, k)


def test_mcnemar_by_hand():
    assert estimators.mcnemar_exact(5, 0) == 2 / 2**5
    assert estimators.mcnemar_exact(1, 9) == estimators.mcnemar_exact(9, 1) == 2 * (1 + 10) / 2**10
    assert estimators.mcnemar_exact(0, 0) == estimators.mcnemar_exact(3, 3) == 1.0
    assert 0.0 < estimators.mcnemar_exact(1400, 1600) < 0.001, "counts whose powers no float holds"


def test_mcnemar_interval_by_hand():
    # All of n are gains: the lower bound of q solves q^n = 0.025, the upper one is 1.
    low, high = estimators.mcnemar_interval(6, 0, 10)
    assert low == pytest.approx((2 * 0.025 ** (1 / 6) - 1) * 0.6) and high == pytest.approx(0.6)
    # 1 of 2: P(X >= 1) = 1 - (1 - q)^2 = 0.025
    low, high = estimators.mcnemar_interval(1, 1, 4)
    assert low == pytest.approx((2 * (1 - 0.975**0.5) - 1) * 0.5) and high == pytest.approx(-low)
    assert estimators.mcnemar_interval(0, 0, 5) == (0.0, 0.0)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_mcnemar_interval_leaves_0_out_where_the_test_rejects(level):
    for num_gained in range(12):
        for num_lost in range(12):
            low, high = estimators.mcnemar_interval(num_gained, num_lost, 30, level=level)
            assert low <= (num_gained - num_lost) / 30 <= high
            rejected = estimators.mcnemar_exact(num_gained, num_lost) < 1 - level
            assert (low > 0 or high < 0) == rejected, (num_gained, num_lost)
            assert estimators.mcnemar_interval(num_lost, num_gained, 30, level=level) == pytest.approx((-high, -low))


def every_sign(differences):
    """The sign-flip test's p-value by trying all signs."""
    flips = [
        sum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(abs(flip) >= abs(sum(differences)) - 1e-9 for flip in flips) / len(flips)


@pytest.mark.parametrize("differences", [[0.5, 0.25, -0.25, 1.0, 0.0, 0.75], [0.1, -0.2, 0.3, 0.1, 0.4, 0.2, 0.6]])
def test_sign_flips_estimate_what_all_signs_give(differences):
    exact = every_sign(differences)
    assert estimators.sign_flip_test(differences) == pytest.approx(exact, abs=OF_CHANCE)
    assert estimators.sign_flip_test([-value for value in differences]) == pytest.approx(exact, abs=OF_CHANCE)


def test_sign_flips_of_right_and_wrong_are_mcnemar_s_test():
    for num_gained, num_lost in ((3, 0), (7, 1), (8, 5), (2, 2)):
        differences = [1.0] * num_gained + [-1.0] * num_lost + [0.0] * 9
        expected = estimators.mcnemar_exact(num_gained, num_lost)
        assert estimators.sign_flip_test(differences) == pytest.approx(expected, abs=OF_CHANCE)


def test_sign_flips_by_hand():
    assert estimators.sign_flip_test([0.0, 0.0]) == estimators.sign_flip_test([0.3]) == 1.0
    assert estimators.sign_flip_test([1.0] * 100) == 1 / 10_000, "no flip of 9999 comes as far"
    assert estimators.sign_flip_test([1.0, 2.0] * 3, seed=4) == estimators.sign_flip_test([1.0, 2.0] * 3, seed=4)


def test_paired_bootstrap_has_the_percentiles_of_every_resample():
    # Two problems: means are 0, 1/2, 1 with chances 1/4, 1/2, 1/4, so a level of 0.4 keeps 1/2 alone.
    assert estimators.paired_bootstrap([0.0, 1.0], level=0.4) == (0.5, 0.5)
    assert estimators.paired_bootstrap([0.0, 1.0], level=0.9) == (0.0, 1.0)
    assert estimators.paired_bootstrap([0.25] * 7) == (0.25, 0.25)
    # Percentiles are near those of the normal: mean 0.5, standard error 0.5 / sqrt(400).
    low, high = estimators.paired_bootstrap([0.0, 1.0] * 200)
    assert (low, high) == pytest.approx((0.451, 0.549), abs=0.008)


def test_paired_bootstrap_repeats_with_its_seed():
    values = [i**0.5 for i in range(20)]
    first = estimators.paired_bootstrap(values, seed=1)
    assert first == estimators.paired_bootstrap(values, seed=1) != estimators.paired_bootstrap(values, seed=2)
    assert estimators.paired_bootstrap([-value for value in values], seed=1) == pytest.approx((-first[1], -first[0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: estimators.mcnemar_exact(-1, 2), "num_gained is -1"),
        (lambda: estimators.mcnemar_interval(1, -2, 5), "num_lost is -2"),
        (lambda: estimators.mcnemar_interval(3, 3, 5), r"num_problems is 5.*together \(6\)"),
        (lambda: estimators.mcnemar_interval(1, 1, 5, level=1.0), "level is 1.0"),
        (lambda: estimators.paired_bootstrap([]), "differences is empty"),
        (lambda: estimators.paired_bootstrap([1.0], num_resamples=0), "num_resamples is 0"),
        (lambda: estimators.sign_flip_test([]), "differences is empty"),
        (lambda: estimators.sign_flip_test([1.0], num_flips=0), "num_flips is 0"),
        (lambda: estimators.paired_bootstrap([1.0], level=0.0), "level is 0.0"),
    ],
)
def test_empty_differences_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

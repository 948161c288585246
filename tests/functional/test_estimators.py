import pytest

from alignlab.functional import estimators
from tests.reference import functional as twin


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

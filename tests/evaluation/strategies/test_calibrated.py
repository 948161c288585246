from __future__ import annotations

from math import inf, log

import pytest

from alignlab.errors import ConfigError
from alignlab.evaluation.strategies.calibrated import calibrate_votes, check_halves, vote_logits
from alignlab.evaluation.strategies.settings import Calibrated


def test_logits_are_logs_of_votes_and_the_last_place_is_all_that_nobody_says(problem):
    logits, worths = vote_logits(problem([0, 1, 0, None], [1.0, 0.0, 1.0, 0.0]), 4)
    assert logits.tolist() == pytest.approx([log(2), 0.0, -inf, log(1.5)])
    assert worths.tolist() == [1.0, 0.0, 0.0, 0.0]
    _, worths = vote_logits(problem([0, 0], [0.0, 0.0]), 2)
    assert worths.tolist() == [0.0, 1.0]


def test_overconfident_votes_get_a_temperature_above_1_and_a_smaller_error(problem):
    # 9 of 10 votes for the leading answer, which is right half of the time; the other answer is right otherwise.
    problems = [
        problem([0] * 9 + [1], [float(right)] * 9 + [float(not right)], row=row)
        for row, right in enumerate([True, False] * 40)
    ]
    calibration = calibrate_votes(problems, Calibrated(held_out_frac=0.5), 0)
    assert calibration.temperature > 2.5 and (calibration.num_fitted, calibration.num_measured) == (40, 40)
    assert calibration.after.value < calibration.before.value
    assert calibration.before.low <= calibration.before.value <= calibration.before.high
    # 9, 1 and 1/2 votes: a confidence of 9 / 10.5
    [bin_of_all] = [of_bin for of_bin in calibration.before.bins if of_bin.size]
    assert bin_of_all.confidence == pytest.approx(9 / 10.5)


@pytest.mark.parametrize(("num_problems", "held_out_frac"), [(3, 0.5), (10, 0.05), (10, 0.95)])
def test_too_few_problems_to_fit_or_to_measure_on_are_refused(num_problems, held_out_frac):
    with pytest.raises(ConfigError, match="must leave at least 2 of"):
        check_halves(Calibrated(held_out_frac=held_out_frac), num_problems)

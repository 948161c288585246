"""Intervals of what trainers measure on held-out data."""

from __future__ import annotations

import json
import math
import random
from statistics import fmean, stdev

import pytest

from alignlab.evaluation.held_out_intervals import (
    agreement_intervals,
    intervals_of,
    label_intervals,
    likelihood_intervals,
    probability_intervals,
)
from alignlab.evaluation.results import LabelResult, LikelihoodResult, PreferenceResult, evaluation_from_json
from alignlab.evaluation.tables import change_table
from alignlab.functional.intervals import wilson_interval


def normal(count: int, mean: float, *, seed: int) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(mean, 1.0) for _ in range(count)]


def test_agreement_has_wilson_s_interval_with_ties_as_halves_and_other_means_the_bootstrap_s():
    margins = normal(200, 0.5, seed=0)
    bounds = agreement_intervals([1.0] * 120 + [0.5] * 40 + [0.0] * 40, {"margin": margins})
    assert bounds["accuracy"] == wilson_interval(0.7, 200)
    half = 1.96 * stdev(margins) / math.sqrt(200)
    assert bounds["margin"] == pytest.approx((fmean(margins) - half, fmean(margins) + half), abs=0.02)


def test_a_single_item_has_an_interval_of_its_bounded_figures_alone():
    assert agreement_intervals([1.0], {"margin": [0.3]}) == {"accuracy": wilson_interval(1.0, 1)}
    assert set(probability_intervals([0.3])) == {"brier"} and likelihood_intervals([2.0], [3]) == {}


def test_label_margins_are_differences_of_two_groups():
    good, bad = normal(100, 2.0, seed=1), normal(50, -1.0, seed=2)
    bounds = label_intervals([1.0] * 150, good + bad, [True] * 100 + [False] * 50, good + bad)
    half = 1.96 * math.sqrt(stdev(good) ** 2 / 100 + stdev(bad) ** 2 / 50)
    middle = fmean(good) - fmean(bad)
    assert bounds["margin"] == pytest.approx((middle - half, middle + half), abs=0.05)
    one_sided = label_intervals([1.0] * 3, [1.0, 2.0, 3.0], [True] * 3, [0.0] * 3)
    assert set(one_sided) == {"accuracy", "loss"}


def test_calibration_error_and_brier_lie_within_their_intervals():
    leads = normal(300, 1.0, seed=3)
    bounds = probability_intervals(leads)
    brier = fmean((1 / (1 + math.exp(lead))) ** 2 for lead in leads)
    low, high = bounds["brier"]
    assert low < brier < high < low + 0.1
    low, high = bounds["calibration_error"]
    assert 0 <= low < high <= 0.5
    assert probability_intervals([0.0] * 4)["brier"] == wilson_interval(0.25, 4), "equal ones give a bootstrap no width"


def test_a_loss_is_resampled_by_completion_and_weighed_by_tokens():
    bounds = likelihood_intervals([10.0] + [3.0] * 20, [100] + [1] * 20)
    low, high = bounds["loss"]
    assert 0.1 <= low < 70 / 120 < high <= 3.0
    assert bounds["perplexity"] == (math.exp(low), math.exp(high))
    assert intervals_of(LikelihoodResult(70 / 120, 21, 120, bounds)) == bounds
    assert set(likelihood_intervals([1e4, 2e4], [1, 1])) == {"loss"}, "a perplexity of infinity has no bounds"


@pytest.mark.parametrize(
    "result",
    [
        PreferenceResult(0.5, 1.0, 2.0, 4, intervals={"accuracy": (0.25, 0.75)}),
        LabelResult(0.5, 1.0, 2.0, 4, {"accuracy": (0.25, 0.75)}),
        LikelihoodResult(2.0, 4, 8, {"loss": (1.5, 2.5), "perplexity": (4.5, 12.25)}),
    ],
)
def test_intervals_are_read_back_shown_and_no_metrics(result):
    assert evaluation_from_json(json.loads(json.dumps(result.to_json()))) == result
    assert "eval/intervals" not in result.metrics()
    without = {name: value for name, value in result.to_json().items() if name != "intervals"}
    assert evaluation_from_json(without).intervals == {}, "of an earlier version"
    [cells] = [list(column.cells) for column in change_table(result, result).columns if column.header == "before"]
    assert any(cell in ("0.500  0.25..0.75", "2.000  1.50..2.50") for cell in cells)
    assert "1.000" in cells or "7.389  4.50..12.25" in cells

from math import log

import pytest
import torch

from alignlab.functional.calibration import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    error_interval,
    expected_calibration_error,
    fit_temperature,
    reliability,
)


def test_the_error_by_hand():
    # Two bins: (0.2, 0.4) right 1 of 2, (0.8, 1.0) right 2 of 2: 2/4 |0.5 - 0.3| + 2/4 |1 - 0.9| = 0.15
    confidence, right = torch.tensor([0.2, 0.4, 0.8, 1.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    low, high = reliability(confidence, right, num_bins=2)
    assert (low.size, high.size) == (2, 2) and (high.low, high.high) == (0.5, 1.0)
    assert (low.confidence, low.right, high.confidence, high.right) == pytest.approx((0.3, 0.5, 0.9, 1.0))
    assert expected_calibration_error([low, high]) == pytest.approx(0.15)


def test_a_confidence_that_is_the_rate_has_no_error():
    bins = reliability(torch.tensor([0.75] * 4), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert expected_calibration_error(bins) == pytest.approx(0.0)


def test_the_temperature_of_two_classes_by_hand():
    # softmax(b [0, log 3]) gives the second class 3^b / (1 + 3^b): 0.9 at b = 2, so T = 1/2; 0.75 at T = 1.
    logits = torch.tensor([[0.0, log(3)]])
    assert fit_temperature(logits, torch.tensor([[0.1, 0.9]])) == pytest.approx(0.5, rel=1e-3)
    assert fit_temperature(logits, torch.tensor([[0.25, 0.75]])) == pytest.approx(1.0, rel=1e-3)


def test_the_temperature_that_labels_were_drawn_with_is_found():
    torch.manual_seed(0)
    logits = torch.randn(4000, 5) * 3
    labels = torch.distributions.Categorical(logits=logits / 2.5).sample()
    targets = torch.nn.functional.one_hot(labels, 5).float()
    fitted = fit_temperature(logits, targets)
    assert fitted == pytest.approx(2.5, rel=0.05)

    def loss(temperature: float) -> float:
        return -float((targets * torch.log_softmax(logits / temperature, -1)).sum())

    assert loss(fitted) < min(loss(fitted * 1.02), loss(fitted / 1.02))


def test_a_class_that_an_item_lacks_does_not_count():
    logits, targets = torch.tensor([[0.0, log(3)]]), torch.tensor([[0.1, 0.9]])
    padded = torch.cat([logits, torch.tensor([[-torch.inf]])], 1), torch.cat([targets, torch.zeros(1, 1)], 1)
    assert fit_temperature(*padded) == pytest.approx(fit_temperature(logits, targets))


def test_where_the_likeliest_is_always_or_never_right_the_temperature_ends_at_a_bound():
    logits = torch.tensor([[0.0, 1.0]])
    assert fit_temperature(logits, torch.tensor([[0.0, 1.0]])) == MIN_TEMPERATURE
    assert fit_temperature(logits, torch.tensor([[1.0, 0.0]])) == MAX_TEMPERATURE


def test_the_interval_holds_the_error():
    assert error_interval(0.1, [0.15, 0.25]) == pytest.approx((0.0, 0.1 + 1.96 * 0.0707), abs=1e-3)


def test_nothing_to_calibrate_on_is_refused():
    with pytest.raises(ValueError, match="give held-out data"):
        fit_temperature(torch.zeros(0, 2), torch.zeros(0, 2))
    with pytest.raises(ValueError, match="num_bins is 0"):
        reliability(torch.ones(1), torch.ones(1), num_bins=0)
    with pytest.raises(ValueError, match="hold no confidence"):
        expected_calibration_error(reliability(torch.ones(0), torch.ones(0)))

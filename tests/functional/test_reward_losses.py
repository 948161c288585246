"""Bradley-Terry, centring and calibration: values by hand, identities, a slow twin, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alignlab.functional.reward_losses import bradley_terry, brier_score, calibration_error, reward_centring


def rewards(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_bradley_terry_by_hand() -> None:
    """-log(1 / (1 + e^-lead)) with odds of 3 to 1: log(4/3), and log 4 the other way round."""
    three = math.log(3.0)
    found = bradley_terry(rewards(three + 1, 0.0, 2.0), rewards(1.0, three, 2.0))
    torch.testing.assert_close(found, rewards(math.log(4 / 3), math.log(4), math.log(2)))


def test_a_margin_is_as_much_less_lead() -> None:
    chosen, rejected, margins = rewards(1.0, 0.5, -2.0), rewards(0.2, 1.5, 0.0), rewards(0.0, 0.7, 3.0)
    with_margin = bradley_terry(chosen, rejected, margins=margins)
    torch.testing.assert_close(with_margin, bradley_terry(chosen - margins, rejected))
    assert (with_margin[1:] > bradley_terry(chosen, rejected)[1:]).all()


def test_a_soft_label_is_between_both_hard_ones() -> None:
    """Lead log 3, so 75 %; a label of 60 %: -0.6 log 0.75 - 0.4 log 0.25. Least where the odds are the label's."""
    soft = bradley_terry(rewards(math.log(3)), rewards(0.0), probabilities=rewards(0.6))
    assert float(soft) == pytest.approx(-0.6 * math.log(0.75) - 0.4 * math.log(0.25))
    lead = rewards(math.log(0.6 / 0.4)).requires_grad_()
    bradley_terry(lead, rewards(0.0), probabilities=rewards(0.6)).sum().backward()
    assert lead.grad is not None and float(lead.grad) == pytest.approx(0, abs=1e-7)


def test_only_differences_count_and_centring_fixes_the_rest() -> None:
    chosen, rejected = rewards(1.0, -0.5), rewards(0.2, 1.5)
    torch.testing.assert_close(bradley_terry(chosen + 7, rejected + 7), bradley_terry(chosen, rejected))
    torch.testing.assert_close(reward_centring(chosen, rejected), rewards(1.44, 1.0))
    assert reward_centring(rewards(3.0), rewards(-3.0)) == 0


def test_large_leads_do_not_overflow() -> None:
    loss = bradley_terry(torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4]))
    torch.testing.assert_close(loss, torch.tensor([0.0, 2e4]))


def test_low_precision_is_computed_in_float32() -> None:
    low = torch.tensor([0.3, 1.25]).bfloat16()
    for found in (bradley_terry(low, low.flip(0)), reward_centring(low, low), brier_score(low), calibration_error(low)):
        assert found.dtype == torch.float32


def test_gradients() -> None:
    chosen, rejected = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    margins = torch.rand(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda c, r: bradley_terry(c, r, margins=margins), (chosen, rejected))
    assert torch.autograd.gradcheck(reward_centring, (chosen, rejected))


def test_brier_by_hand() -> None:
    assert float(brier_score(rewards(0.0))) == 0.25
    assert float(brier_score(rewards(math.log(3)))) == pytest.approx(1 / 16)
    assert float(brier_score(rewards(math.log(3), -math.log(3)))) == pytest.approx((1 / 16 + 9 / 16) / 2)


def test_calibration_by_hand() -> None:
    """Four pairs at 75 %: three right is calibrated, four right is 25 % off; a coin is calibrated on ties."""
    lead = math.log(3)
    assert float(calibration_error(rewards(lead, lead, lead, -lead))) == pytest.approx(0, abs=1e-12)
    assert float(calibration_error(rewards(lead, lead, lead, lead))) == pytest.approx(0.25)
    assert float(calibration_error(rewards(0.0, 0.0))) == 0
    two_bins = rewards(lead, lead, lead, -lead, math.log(19), -math.log(19))  # 95 %, half of them right
    assert float(calibration_error(two_bins)) == pytest.approx(0.45 * 2 / 6)
    assert float(calibration_error(two_bins, num_bins=1)) == pytest.approx(abs(4 / 6 - (4 * 0.75 + 2 * 0.95) / 6))


@given(st.lists(st.floats(-6, 6), min_size=1, max_size=30), st.integers(1, 12))
def test_calibration_equals_the_slow_twin(leads: list[float], num_bins: int) -> None:
    bins: dict[int, list[tuple[float, float]]] = {}
    for lead in leads:
        p = float(rewards(lead).sigmoid())
        confidence, right = max(p, 1 - p), 1.0 if lead > 0 else 0.5 if lead == 0 else 0.0
        bins.setdefault(min(int((confidence - 0.5) * 2 * num_bins), num_bins - 1), []).append((confidence, right))
    slow = sum(
        len(own) / len(leads) * abs(sum(r for _, r in own) / len(own) - sum(c for c, _ in own) / len(own))
        for own in bins.values()
    )
    assert float(calibration_error(rewards(*leads), num_bins=num_bins)) == pytest.approx(slow, abs=1e-9)


def test_a_calibration_needs_a_bin() -> None:
    with pytest.raises(ValueError, match="num_bins is 0, and must be at least 1"):
        calibration_error(rewards(1.0), num_bins=0)

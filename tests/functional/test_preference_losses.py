"""Preference losses by hand, their values at equal policies, and their gradients."""

import math

import pytest
import torch

from alignlab.functional import preference_losses as losses

MARGINS = torch.tensor([0.0, 1.0, -2.0])


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_dpo_is_log_two_at_equal_policies():
    assert losses.dpo_sigmoid(torch.zeros(2), beta=0.3).tolist() == pytest.approx([math.log(2)] * 2)
    assert losses.dpo_sigmoid(torch.zeros(1), beta=0.3, label_smoothing=0.2).item() == pytest.approx(math.log(2))
    assert losses.dpo_robust(torch.zeros(1), beta=0.3, label_smoothing=0.2).item() == pytest.approx(math.log(2))


def test_dpo_by_hand():
    expected = [-math.log(sigmoid(0.5 * m)) for m in MARGINS.tolist()]
    assert losses.dpo_sigmoid(MARGINS, beta=0.5).tolist() == pytest.approx(expected)
    smooth = [-0.9 * math.log(sigmoid(0.5 * m)) - 0.1 * math.log(sigmoid(-0.5 * m)) for m in MARGINS.tolist()]
    assert losses.dpo_sigmoid(MARGINS, beta=0.5, label_smoothing=0.1).tolist() == pytest.approx(smooth)


def test_robust_dpo_is_unbiased_under_flipped_labels():
    """The mean loss over labels that are flipped with probability s is the loss of the true labels."""
    s = 0.2
    kept = losses.dpo_robust(MARGINS, beta=0.5, label_smoothing=s)
    flipped = losses.dpo_robust(-MARGINS, beta=0.5, label_smoothing=s)
    torch.testing.assert_close((1 - s) * kept + s * flipped, losses.dpo_sigmoid(MARGINS, beta=0.5))


def test_ipo_is_zero_at_its_target_and_pulls_back_beyond_it():
    margins = torch.tensor([2.5, 4.0, 0.0], requires_grad=True)
    found = losses.ipo(margins, beta=0.2)
    assert found.tolist() == pytest.approx([0.0, 1.5**2, 2.5**2])
    found.sum().backward()
    assert margins.grad.tolist() == pytest.approx([0.0, 3.0, -5.0])


def test_hinge_by_hand():
    assert losses.hinge(torch.tensor([0.0, 1.0, 3.0, -1.0]), beta=0.5).tolist() == pytest.approx([1.0, 0.5, 0.0, 1.5])


def test_simpo_by_hand():
    found = losses.simpo(torch.tensor([-1.0]), torch.tensor([-1.5]), beta=2.0, gamma=0.6)
    assert found.item() == pytest.approx(-math.log(sigmoid(2.0 * 0.5 - 0.6)))


def test_orpo_odds_by_hand_and_at_certainty():
    p, q = math.exp(-0.5), math.exp(-1.0)
    expected = -math.log(sigmoid(math.log(p / (1 - p)) - math.log(q / (1 - q))))
    assert losses.orpo_odds(torch.tensor([-0.5]), torch.tensor([-1.0])).item() == pytest.approx(expected)
    certain = torch.zeros(1, requires_grad=True)
    found = losses.orpo_odds(certain, torch.tensor([-1.0]))
    found.backward()
    assert math.isfinite(found.item()) and math.isfinite(certain.grad.item())


def test_kto_by_hand():
    r, z = torch.tensor([1.5, 1.5, -0.5]), torch.tensor(0.5)
    found = losses.kto(r, torch.tensor([True, False, True]), z, beta=0.4, desirable_weight=2.0, undesirable_weight=3.0)
    expected = [2 * (1 - sigmoid(0.4)), 3 * (1 - sigmoid(-0.4)), 2 * (1 - sigmoid(-0.4))]
    assert found.tolist() == pytest.approx(expected)


def test_kto_is_half_the_weight_at_equal_policies_and_pushes_the_two_kinds_apart():
    r = torch.zeros(2, requires_grad=True)
    z = losses.kto_reference_point(torch.tensor(0.0), torch.tensor(7.0))
    found = losses.kto(r, torch.tensor([True, False]), z, beta=0.2, desirable_weight=0.6, undesirable_weight=1.4)
    found.sum().backward()
    assert found.tolist() == pytest.approx([0.3, 0.7])
    assert r.grad.tolist() == pytest.approx([-0.6 * 0.2 / 4, 1.4 * 0.2 / 4])


def test_the_reference_point_of_kto_is_a_mean_that_is_never_negative_and_has_no_gradient():
    total = torch.tensor(3.0, requires_grad=True)
    assert losses.kto_reference_point(total, torch.tensor(4.0)).item() == pytest.approx(0.75)
    assert not losses.kto_reference_point(total, torch.tensor(4.0)).requires_grad
    assert losses.kto_reference_point(torch.tensor(-3.0), torch.tensor(4.0)).item() == 0
    assert not losses.kto(torch.ones(1), torch.tensor([True]), total, beta=1.0).requires_grad


@pytest.mark.parametrize(
    "loss",
    [
        lambda m: losses.dpo_sigmoid(m, beta=0.3, label_smoothing=0.1), lambda m: losses.ipo(m, beta=0.3),
        lambda m: losses.dpo_robust(m, beta=0.3, label_smoothing=0.1),
        lambda m: losses.simpo(m, -m, beta=0.3, gamma=0.1), lambda m: losses.hinge(m, beta=0.3),
        lambda m: losses.kto(m, m > 0, torch.tensor(0.2), beta=0.3, desirable_weight=0.5, undesirable_weight=2.0),
        lambda m: losses.orpo_odds(-m.exp() - 0.1, -m.square() - 0.2),
    ],
)  # fmt: skip
def test_gradients(loss):
    assert torch.autograd.gradcheck(loss, torch.tensor([0.3, 1.0, -0.7], dtype=torch.float64, requires_grad=True))

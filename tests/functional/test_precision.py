import math

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation

from alignlab.functional import policy_losses, precision


def test_at_least_float32_keeps_float64():
    assert precision.at_least_float32(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert precision.at_least_float32(torch.ones(1, dtype=torch.float64)).dtype == torch.float64


def test_clamped_exp_is_exact_below_and_flat_above_twenty():
    x = torch.tensor([-40.0, 1.0, 25.0], dtype=torch.float64, requires_grad=True)
    y = precision.clamped_exp(x)
    y.sum().backward()
    assert y.tolist() == pytest.approx([math.exp(-40), math.e, math.exp(20)])
    assert x.grad.tolist() == pytest.approx([math.exp(-40), math.e, 0.0])


def test_shapes_are_checked_in_these_tests():
    with pytest.raises((BeartypeCallHintViolation, TypeError)):
        policy_losses.reinforce(torch.zeros(3), torch.zeros(4))

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab.functional import kl
from tests.reference import functional as twin

ESTIMATORS = ("k1", "k2", "k3")
logits = st.lists(st.floats(-3, 3), min_size=4, max_size=4)


def log_softmax(values):
    return torch.log_softmax(torch.tensor(values, dtype=torch.float64), -1)


def test_estimators_by_hand():
    logprobs, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    torch.testing.assert_close(kl.kl_k1(logprobs, ref), torch.tensor([0.5, -1.0]))
    torch.testing.assert_close(kl.kl_k2(logprobs, ref), torch.tensor([0.125, 0.5]))
    torch.testing.assert_close(kl.kl_k3(logprobs, ref), torch.tensor([math.exp(-0.5) - 0.5, math.e - 2.0]))


@given(logits, logits)
def test_k1_and_k3_are_unbiased(policy, reference):
    """Exactly, by summing over the four actions."""
    logprobs, ref = log_softmax(policy), log_softmax(reference)
    exact = twin.kl(logprobs.exp().tolist(), ref.exp().tolist())
    for estimate in (kl.kl_k1, kl.kl_k3):
        assert (logprobs.exp() * estimate(logprobs, ref)).sum().item() == pytest.approx(exact, abs=1e-12)


def test_k2_and_k3_are_never_negative_and_small_differences_survive_float32():
    logprobs = torch.linspace(-3, -0.1, 1001)
    ref = logprobs + torch.linspace(-1e-3, 1e-3, 1001)
    assert (kl.kl_k2(logprobs, ref) >= 0).all()
    assert (kl.kl_k3(logprobs, ref) >= 0).all()
    exact = kl.kl_k3(logprobs.double(), ref.double())
    # exp(x) - x - 1, without expm1, would be wrong by 6e-8 here.
    torch.testing.assert_close(kl.kl_k3(logprobs, ref).double(), exact, rtol=0.0, atol=1e-10)


def test_k3_exponent_is_clamped():
    value = kl.kl_k3(torch.tensor([-100.0]), torch.tensor([0.0]))
    assert value.item() == pytest.approx(math.exp(20) - 1 - 100)


def expected_gradient(policy, reference, old, estimator):
    """Sum over actions of old(a) * d loss(a) / d logits: the expectation over tokens sampled from the old policy."""
    parameters = torch.tensor(policy, dtype=torch.float64, requires_grad=True)
    old_logprobs = log_softmax(old)
    losses = kl.kl_loss(torch.log_softmax(parameters, -1), log_softmax(reference), old_logprobs, estimator=estimator)
    (old_logprobs.exp() * losses).sum().backward()
    return parameters.grad


def exact_gradient(policy, reference):
    parameters = torch.tensor(policy, dtype=torch.float64, requires_grad=True)
    logprobs = torch.log_softmax(parameters, -1)
    (logprobs.exp() * (logprobs - log_softmax(reference))).sum().backward()
    return parameters.grad


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(policy=logits, reference=logits, old=logits)
def test_the_expected_gradient_is_the_exact_kls(estimator, policy, reference, old):
    """On-policy (old = policy) and off-policy."""
    exact = exact_gradient(policy, reference)
    for sampler in (policy, old):
        torch.testing.assert_close(
            expected_gradient(policy, reference, sampler, estimator), exact, rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("estimator", ("k1", "k3"))
def test_the_expected_value_is_the_exact_kl_off_policy_too(estimator):
    logprobs, ref, old = log_softmax([0.3, -1, 2, 0]), log_softmax([1.0, 0, 0, 0]), log_softmax([0.0, 1, 1, 0])
    value = (old.exp() * kl.kl_loss(logprobs, ref, old, estimator=estimator)).sum().item()
    assert value == pytest.approx(twin.kl(logprobs.exp().tolist(), ref.exp().tolist()), abs=1e-12)


@pytest.mark.parametrize(("estimator", "plain"), [("k1", kl.kl_k1), ("k2", kl.kl_k2), ("k3", kl.kl_k3)])
def test_on_policy_the_loss_has_the_estimators_value_and_ratio_times_k1_for_gradient(estimator, plain):
    logprobs = torch.tensor([-1.0, -0.2, -3.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.5, -0.1, -1.0], dtype=torch.float64)
    torch.testing.assert_close(kl.kl_loss(logprobs, ref, logprobs.detach(), estimator=estimator), plain(logprobs, ref))
    old = logprobs.detach() + torch.tensor([0.5, -0.1, 1.0], dtype=torch.float64)
    kl.kl_loss(logprobs, ref, old, estimator=estimator).sum().backward()
    torch.testing.assert_close(logprobs.grad, ((logprobs - old).exp() * (logprobs - ref)).detach())


def test_a_bare_k1_loss_would_have_no_gradient_on_average():
    """The mean gradient of a bare k1 loss is zero, which is why `kl_loss` multiplies by the ratio."""
    parameters = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    logprobs = torch.log_softmax(parameters, -1)
    (logprobs.detach().exp() * kl.kl_k1(logprobs, log_softmax([0.0, 0.0, 0.0]))).sum().backward()
    assert parameters.grad.abs().max() < 1e-15


def test_only_the_policy_gets_a_gradient():
    logprobs, ref, old = (torch.full((2,), -1.0 - i, requires_grad=True) for i in range(3))
    kl.kl_loss(logprobs, ref, old, estimator="k3").sum().backward()
    assert logprobs.grad is not None
    assert ref.grad is None
    assert old.grad is None


@settings(max_examples=25)
@given(st.floats(0, 1), st.floats(0.01, 1))
def test_adaptive_coefficient_moves_towards_the_target_within_its_bounds(measured, target):
    new = kl.adapt_kl_coef(0.5, measured, target=target, horizon=100, num_samples=50)
    assert 0.5 * 0.9 <= new <= 0.5 * 1.1
    assert (new - 0.5) * (measured - target) >= 0


def test_adaptive_coefficient_by_hand():
    assert kl.adapt_kl_coef(0.1, 0.55, target=0.5, horizon=1000, num_samples=64) == pytest.approx(0.1 * 1.0064)
    assert kl.adapt_kl_coef(0.1, 9.0, target=0.5, horizon=1000, num_samples=64) == pytest.approx(0.1 * 1.0128)
    assert kl.adapt_kl_coef(0.1, 0.0, target=0.5, horizon=1000, num_samples=64) == pytest.approx(0.1 * 0.9872)

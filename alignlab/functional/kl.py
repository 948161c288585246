"""KL of the policy to the reference, estimated from the sampled tokens. Nats; [N] tensors, one value a token.

With x = logprobs - ref_logprobs at a token sampled from the policy, each of k1, k2, k3 is a number whose expectation is
(k2: nearly is) KL(policy || reference) of the next-token distributions. As a *loss* they are not to be used as they
are: the expected gradient of k1 is zero, that of k3 is the gradient of the reverse divergence. `kl_loss` is right.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from alignlab.functional.precision import MAX_EXPONENT, at_least_float32, clamped_exp

KLEstimator = Literal["k1", "k2", "k3"]


def kl_k1(logprobs: Float[Tensor, "N"], ref_logprobs: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Unbiased, with either sign; the one to subtract from a reward, as a fixed number.

        k1 = logprobs - ref_logprobs

    Args:
        logprobs: log p of each token under the policy that sampled it, nats.
        ref_logprobs: the same under the reference, nats.

    Reference: Schulman (2020), "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html.
    """
    return at_least_float32(logprobs) - at_least_float32(ref_logprobs)


def kl_k2(logprobs: Float[Tensor, "N"], ref_logprobs: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Biased to second order, >= 0, of low variance; its expected gradient on-policy is exactly the KL's.

        k2 = (logprobs - ref_logprobs)^2 / 2

    Args:
        logprobs: log p of each token under the policy that sampled it, nats.
        ref_logprobs: the same under the reference, nats.

    Reference: Schulman (2020), "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html.
    """
    return 0.5 * kl_k1(logprobs, ref_logprobs).square()


def kl_k3(logprobs: Float[Tensor, "N"], ref_logprobs: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Unbiased, >= 0, of low variance.

        k3 = exp(ref_logprobs - logprobs) - (ref_logprobs - logprobs) - 1

    The exponent is clamped at 20 from above, where the value is 4.9e8 and the exponential's gradient becomes 0.

    Args:
        logprobs: log p of each token under the policy that sampled it, nats.
        ref_logprobs: the same under the reference, nats.

    Reference: Schulman (2020), "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html.
    """
    log_ratio = -kl_k1(logprobs, ref_logprobs)
    return torch.expm1(log_ratio.clamp(max=MAX_EXPONENT)) - log_ratio


def kl_loss(
    logprobs: Float[Tensor, "N"],
    ref_logprobs: Float[Tensor, "N"],
    old_logprobs: Float[Tensor, "N"],
    *,
    estimator: KLEstimator,
) -> Float[Tensor, "N"]:
    """KL of each token as a loss: the expectation of its gradient over tokens sampled from the *old* policy is exactly
    the gradient of KL(policy || reference) of the next-token distribution, on-policy and off-policy.

        ratio = exp(logprobs - old_logprobs)         sg: no gradient
        k1: loss = ratio * sg(k1)
        k2: loss = sg(ratio) * k2
        k3: loss = ratio * k3
        gradient of each: ratio * (logprobs - ref_logprobs) * grad logprobs

    k1 as it stands has the gradient `grad logprobs`, zero on average; k3 as it stands has the gradient of
    KL(reference || policy). Times the ratio, all three have the gradient above token by token, and differ in the value
    alone. The exponents are clamped at 20 from above, and pass no gradient there.

    Args:
        logprobs: log p of each token under the policy in training, nats; carries the gradient.
        ref_logprobs: the same under the reference; no gradient.
        old_logprobs: the same under the policy that the tokens are taken to be sampled from; no gradient.
        estimator: which value is reported, importance-weighted by the ratio.

    Reference: DeepSeek-AI (2025), DeepSeek-V3.2, arXiv:2512.02556, Sec. 3.1, "Unbiased KL Estimate" (k3);
        Schulman (2020) for the estimators.
    """
    ref_logprobs = ref_logprobs.detach()
    ratio = clamped_exp(kl_k1(logprobs, old_logprobs.detach()))
    if estimator == "k1":
        return ratio * kl_k1(logprobs, ref_logprobs).detach()
    if estimator == "k2":
        return ratio.detach() * kl_k2(logprobs, ref_logprobs)
    if estimator == "k3":
        return ratio * kl_k3(logprobs, ref_logprobs)
    raise ValueError(f"estimator is {estimator!r}, and must be one of k1, k2, k3")


def adapt_kl_coef(coef: float, kl: float, *, target: float, horizon: int, num_samples: int) -> float:
    """Return the coefficient for the next step, moved so that the KL holds at `target`.

        coef * (1 + clip(kl / target - 1, -0.2, 0.2) * num_samples / horizon)

    Args:
        coef: the present coefficient, > 0.
        kl: measured this step, in the unit of `target` (nats a token here).
        target: the KL to hold, > 0.
        horizon: samples over which the coefficient moves by at most about 20 %, at least `num_samples`.
        num_samples: completions of this step.

    Reference: Ziegler et al. (2019), arXiv:1909.08593, Sec. 2.2 (their gain K = 0.1 is num_samples / horizon).
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * num_samples / horizon)

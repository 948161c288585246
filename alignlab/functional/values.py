"""A critic's side of PPO: token rewards, generalised advantages, the clipped value loss.

Shapes: N tokens of one pack, B sequences. `values[t]` is of the state in which token t was chosen, so that every [N]
tensor is indexed by the token that it describes. Only masked tokens are steps of the decision process: what a policy
did not write (a prompt, a tool's answer) lies between two steps, and takes neither time nor credit.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from alignlab.functional.precision import at_least_float32
from alignlab.functional.reduction import mean_and_variance, on_tokens


def token_rewards(
    rewards: Float[Tensor, "B"],
    kl: Float[Tensor, "N"],
    *,
    mask: Bool[Tensor, "N"],
    sequence_ids: Int[Tensor, "N"],
    kl_coef: float,
) -> Float[Tensor, "N"]:
    """Reward of each step: the price of its KL, and the sequence's reward at its last step.

        r[t] = -kl_coef * kl[t] + [t is the last masked token of its sequence b] * rewards[b]

    Args:
        rewards: of each sequence.
        kl: of each token to the reference, k1, as a fixed number, nats.
        mask: tokens that the policy sampled.
        sequence_ids: which sequence each token belongs to; -1 on shared prompts.
        kl_coef: >= 0.

    Reference: Ziegler et al. (2019), arXiv:1909.08593, Eq. 2; Ouyang et al. (2022), arXiv:2203.02155, Eq. 2.
    """
    index = torch.where(mask, torch.arange(len(mask), device=mask.device), -1)
    last = torch.full((len(rewards),), -1, device=mask.device)
    ids = sequence_ids.clamp(min=0).long()
    last = last.scatter_reduce(0, ids, index, "amax")
    priced = torch.where(mask, -kl_coef * at_least_float32(kl), 0.0)
    is_last = mask & (sequence_ids >= 0) & (last[ids] == index)
    return priced + torch.where(is_last, on_tokens(at_least_float32(rewards), sequence_ids, elsewhere=0.0), 0.0)


def gae(
    rewards: Float[Tensor, "N"],
    values: Float[Tensor, "N"],
    *,
    mask: Bool[Tensor, "N"],
    sequence_ids: Int[Tensor, "N"],
    num_sequences: int,
    gamma: float,
    lam: float,
) -> Float[Tensor, "N"]:
    """Generalised advantage of each step, from the last step of each sequence to its first.

        delta[i] = r[i] + gamma * V[i+1] - V[i]
        A[i]     = delta[i] + gamma * lam * A[i+1]        V and A are 0 after the last step

    i counts a sequence's masked tokens, so that both recursions are carried across the tokens between them. The
    critic's targets are A + V, the TD(lambda) returns. The recursion is computed in log2(N) passes over all tokens,
    each of which doubles how far a sum reaches.

    Args:
        rewards: of each step.
        values: of the state before each step, without a gradient.
        mask: tokens that the policy sampled.
        sequence_ids: which sequence each token belongs to; -1 on shared prompts.
        num_sequences: B.
        gamma: discount, in (0, 1].
        lam: 0 trusts the critic after one step, 1 not at all; in [0, 1].

    Returns:
        [N], 0 off the mask.

    Reference: Schulman et al. (2016), arXiv:1506.02438, Eq. 16.
    """
    ids = torch.where(mask, sequence_ids, num_sequences)  # the others are a last sequence, of zeros
    order = ids.argsort(stable=True)
    ids, r, v = (x[order] for x in (ids, *(torch.where(mask, at_least_float32(x), 0.0) for x in (rewards, values))))
    deltas = r + gamma * _shifted(v, ids, 1) - v
    return torch.empty_like(deltas).scatter(0, order, _discounted_sums(deltas, ids, gamma * lam))


def _discounted_sums(x: Float[Tensor, "N"], ids: Int[Tensor, "N"], discount: float) -> Float[Tensor, "N"]:
    """Sum over j >= i of discount^(j - i) x[j], within runs of equal ids."""
    reach = 1
    while reach < len(x):
        x = x + discount**reach * _shifted(x, ids, reach)
        reach *= 2
    return x


def _shifted(x: Float[Tensor, "N"], ids: Int[Tensor, "N"], distance: int) -> Float[Tensor, "N"]:
    """x[i + distance], or 0 where that has another id; equal ids are consecutive."""
    is_same = ids[distance:] == ids[:-distance]
    return torch.nn.functional.pad(torch.where(is_same, x[distance:], 0.0), (0, distance))


def value_loss(
    values: Float[Tensor, "N"],
    old_values: Float[Tensor, "N"],
    returns: Float[Tensor, "N"],
    *,
    clip: float | None,
) -> tuple[Float[Tensor, "N"], Bool[Tensor, "N"]]:
    """Squared error of each token's value, the worse of as it is and of moved by at most `clip`.

        loss = max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) / 2

    Args:
        values: of the critic in training; carries the gradient.
        old_values: of the critic before the update.
        returns: what they should be.
        clip: c > 0, in units of reward; None is the plain squared error.

    Returns:
        (loss, clipped), both [N]: clipped is where the bound acts, and the gradient is 0.

    Reference: Schulman et al. (2017), arXiv:1707.06347, Eq. 9, as clipped in its published code; Engstrom et al.
    (2020), arXiv:2005.12729, Sec. 3.
    """
    values, old_values, returns = (at_least_float32(x) for x in (values, old_values, returns))
    plain = (values - returns).square()
    if clip is None:
        return 0.5 * plain, torch.zeros_like(plain, dtype=torch.bool)
    moved = values - old_values
    bounded = (old_values + moved.clamp(-clip, clip) - returns).square()
    # Within the bounds the two errors differ by rounding alone.
    return 0.5 * torch.maximum(plain, bounded), (moved.abs() > clip) & (bounded > plain)


def whitened(
    x: Float[Tensor, "N"], mask: Bool[Tensor, "N"], *, mean: float, variance: float, eps: float = 1e-8
) -> Float[Tensor, "N"]:
    """Values of mean 0 and variance 1, those of the whole step being as given; 0 off the mask.

        (x - mean) / sqrt(variance + eps)
    """
    return torch.where(mask, (at_least_float32(x) - mean) * (variance + eps) ** -0.5, 0.0)


def explained_variance(returns: Float[Tensor, "3"], errors: Float[Tensor, "3"]) -> float:
    """Fraction of the returns' variance that the critic explains; below 0 it predicts worse than their mean.

        1 - Var(R - V) / Var(R)

    Args:
        returns, errors: added `moments` of R, and of R - V. Returns that do not vary give 0.
    """
    _, variance = mean_and_variance(returns)
    return 1.0 - mean_and_variance(errors)[1] / variance if variance > 0 else 0.0

"""A critic's side of PPO: token rewards, generalised advantages, the clipped value loss.

Shapes: N tokens of one pack, B sequences. `values[t]` is of the state in which token t was chosen, so that every [N]
tensor is indexed by the token that it describes. Only masked tokens are steps of the decision process: what a policy
did not write (a prompt, a tool's answer) lies between two steps, and takes neither time nor credit.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from alignlab.functional.precision import at_least_float32
from alignlab.functional.reduction import mean_and_variance


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
    index = torch.arange(len(mask), device=mask.device)
    last = torch.full((len(rewards),), -1, device=mask.device)
    last = last.scatter_reduce(0, sequence_ids[mask].long(), index[mask], "amax")
    has_token = last >= 0
    priced = torch.where(mask, -kl_coef * at_least_float32(kl), 0.0)
    return priced.index_add(0, last[has_token], at_least_float32(rewards)[has_token])


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
    critic's targets are A + V, the TD(lambda) returns.

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
    steps, places = _steps(mask, sequence_ids)
    length = int(places[1].max()) + 1 if len(steps) else 0
    r, v = (at_least_float32(x).new_zeros(num_sequences, length + 1) for x in (rewards, values))
    r[places], v[places] = at_least_float32(rewards)[steps], at_least_float32(values)[steps]
    advantages, following = torch.zeros_like(r), r.new_zeros(num_sequences)
    for i in reversed(range(length)):
        # Past a sequence's end rewards and values are 0, and so is what is carried from there.
        following = r[:, i] + gamma * v[:, i + 1] - v[:, i] + gamma * lam * following
        advantages[:, i] = following
    return torch.zeros_like(at_least_float32(rewards)).index_put((steps,), advantages[places])


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
    bounded = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    return 0.5 * torch.maximum(plain, bounded), bounded > plain


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


def _steps(
    mask: Bool[Tensor, "N"], sequence_ids: Int[Tensor, "N"]
) -> tuple[Int[Tensor, "S"], tuple[Int[Tensor, "S"], Int[Tensor, "S"]]]:
    """Indices of the masked tokens, sequence by sequence; of each its sequence, and its number in it."""
    steps = mask.nonzero()[:, 0]
    steps = steps[sequence_ids[steps].argsort(stable=True)]
    sequences = sequence_ids[steps].long()
    counts = torch.bincount(sequences) if len(steps) else sequences
    first = counts.cumsum(0) - counts
    return steps, (sequences, torch.arange(len(steps), device=mask.device) - first[sequences])

"""Advantages without a critic: each reward against a baseline made of other rewards.

Shapes: P prompts, G completions of each; N tokens of one pack, B sequences. A nan reward (no reward function applied)
takes no part in any mean or deviation and gets advantage 0; so does every completion of a group with fewer than 2
rewards, which has no baseline. Equal rewards give exactly 0, not rounding noise divided by a small epsilon: rewards are
first taken relative to the smallest, which makes equal ones exactly 0.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from alignlab.functional.precision import at_least_float32
from alignlab.functional.values import gae, token_rewards


def group_normalized(rewards: Float[Tensor, "P G"], *, eps: float = 1e-4) -> Float[Tensor, "P G"]:
    """Distance from the group's mean in units of its standard deviation.

        A = (r - mean) / (std + eps)        std unbiased, over n - 1

    Args:
        rewards: of each completion; nan where there is none.
        eps: > 0, in units of reward; shrinks the advantages of groups whose rewards barely differ.

    Reference: Shao et al. (2024), GRPO, arXiv:2402.03300, Sec. 4.1.2.
    """
    centered, count, valid = _centered(rewards)
    return torch.where(valid, centered / (_std(centered, count) + eps), 0.0)


def group_centered(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Distance from the group's mean, in units of reward: no group counts more for agreeing with itself.

        A = r - mean

    Args:
        rewards: of each completion; nan where there is none.

    Reference: Liu et al. (2025), Dr. GRPO, arXiv:2503.20783, Sec. 3.2.
    """
    return _centered(rewards)[0]


def leave_one_out(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Distance from the mean of the *other* rewards of the group: a baseline independent of the completion.

        A = r - (sum - r) / (n - 1) = (r - mean) * n / (n - 1)

    Args:
        rewards: of each completion; nan where there is none.

    Reference: Ahmadian et al. (2024), RLOO, arXiv:2402.14740, Sec. 2.2.
    """
    centered, count, _ = _centered(rewards)
    return centered * (count / (count - 1).clamp(min=1))


def batch_whitened(rewards: Float[Tensor, "P G"], *, eps: float = 1e-4) -> Float[Tensor, "P G"]:
    """Distance from the mean of the whole batch in units of its standard deviation; prompts are not told apart.

        A = (r - mean) / (std + eps)        mean and unbiased std over all P * G rewards

    Every completion counts once, whatever its length. REINFORCE++ itself normalises over tokens: `rewards_to_go`,
    whitened by `values.whitened`.

    Args:
        rewards: of each completion of the whole step, over all ranks; nan where there is none.
        eps: > 0, in units of reward.

    Reference: after Hu et al. (2025), REINFORCE++, arXiv:2501.03262, with completions in the place of tokens.
    """
    return group_normalized(rewards.reshape(1, -1), eps=eps).reshape(rewards.shape)


def rewards_to_go(
    rewards: Float[Tensor, "B"],
    kl: Float[Tensor, "N"],
    *,
    mask: Bool[Tensor, "N"],
    sequence_ids: Int[Tensor, "N"],
    kl_coef: float,
) -> Float[Tensor, "N"]:
    """Return of each token: its sequence's reward, less the price of the KL from this token to the last.

        A[t] = rewards[b] - kl_coef * sum over the tokens i >= t of b of kl[i]        t of sequence b

    What the tokens before t cost is no consequence of t, and would only add variance. REINFORCE++ then normalises A to
    mean 0 and variance 1 over all tokens of the batch (Eq. 10), which is `values.whitened`; with a baseline, the reward
    is first taken relative to its group's mean (`group_centered`).

    Args:
        rewards: of each sequence; finite.
        kl: of each token to the reference, k1, as a fixed number, nats.
        mask: tokens that the policy sampled; all masked tokens of a sequence must be in this pack.
        sequence_ids: which sequence each token belongs to; -1 on shared prompts.
        kl_coef: >= 0.

    Returns:
        [N], 0 off the mask.

    Reference: Hu et al. (2025), REINFORCE++, arXiv:2501.03262v9, Eqs. 8 and 9.
    """
    steps = token_rewards(rewards, kl, mask=mask, sequence_ids=sequence_ids, kl_coef=kl_coef)
    # Without a critic (V = 0), undiscounted and with lambda 1, the generalised advantage is the return.
    return gae(
        steps, torch.zeros_like(steps), mask=mask, sequence_ids=sequence_ids, num_sequences=len(rewards), gamma=1.0,
        lam=1.0,
    )


def mixed_groups(rewards: Float[Tensor, "P G"]) -> Bool[Tensor, "P"]:
    """Groups that carry signal: at least two of their rewards differ. Dynamic sampling keeps these.

    Args:
        rewards: of each completion; nan where there is none.

    Reference: Yu et al. (2025), DAPO, arXiv:2503.14476, Eq. 11.
    """
    return (_relative(rewards)[0] > 0).any(dim=1)


def _relative(rewards: Float[Tensor, "P G"]) -> tuple[Float[Tensor, "P G"], Bool[Tensor, "P G"]]:
    """Rewards less the group's smallest, 0 where there is none; and which there are."""
    rewards = at_least_float32(rewards)
    valid = ~rewards.isnan()
    smallest = torch.where(valid, rewards, torch.inf).amin(dim=1, keepdim=True)
    return torch.where(valid, rewards - smallest, 0.0), valid


def _centered(
    rewards: Float[Tensor, "P G"],
) -> tuple[Float[Tensor, "P G"], Float[Tensor, "P 1"], Bool[Tensor, "P G"]]:
    """Rewards less the group's mean, 0 where there is none; rewards of each group; and which there are."""
    relative, valid = _relative(rewards)
    count = valid.sum(dim=1, keepdim=True).to(relative.dtype)
    mean = relative.sum(dim=1, keepdim=True) / count.clamp(min=1)
    return torch.where(valid, relative - mean, 0.0), count, valid


def _std(centered: Float[Tensor, "P G"], count: Float[Tensor, "P 1"]) -> Float[Tensor, "P 1"]:
    """Unbiased standard deviation of each group; 0 with fewer than 2 rewards."""
    return (centered.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()

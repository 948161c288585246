"""Balance of a mixture of experts: losses of the router, and the update of its balancing bias.

Shapes: N tokens, E experts, L MoE layers.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Num
from torch import Tensor


def switch_balance_loss(probs: Float[Tensor, "N E"], load_frac: Float[Tensor, "E"]) -> Float[Tensor, "N"]:
    """Load-balance loss of each token, to be minimised.

        loss = E * sum_i f_i * p_i

    Its mean over tokens is the Switch loss, 1 where the load is even. f is a constant that the caller keeps, the load
    of an earlier step over all its tokens: with the f of the tokens at hand, the gradient would depend on how a batch
    is cut into micro-batches.

    Args:
        probs: the router's probabilities, or scores normalised to 1; carry the gradient.
        load_frac: fraction of the choices that went to each expert; sums to 1, no gradient.

    Reference: Fedus et al. (2021), arXiv:2101.03961, Eq. 4.
    """
    return probs.shape[-1] * (probs.float() @ load_frac.float())


def router_z_loss(logits: Float[Tensor, "N E"]) -> Float[Tensor, "N"]:
    """Square of the log-partition of each token's router logits, which keeps them small.

    Reference: Zoph et al. (2022), arXiv:2202.08906, Eq. 5.
    """
    return torch.logsumexp(logits.float(), dim=-1).square()


def router_bias_update(
    bias: Float[Tensor, "*L E"], counts: Num[Tensor, "*L E"], *, rate: float
) -> Float[Tensor, "*L E"]:
    """Return the next balancing bias: up by `rate` for experts below the mean load, down for those above it.

    The bias is added to the scores that choose experts, never to the gates.

    Args:
        bias: present bias.
        counts: choices of each expert since the last update, over all ranks.
        rate: size of the step, >= 0.

    Reference: Wang et al. (2024), arXiv:2408.15664, Alg. 1.
    """
    counts = counts.float()
    return bias + rate * torch.sign(counts.mean(dim=-1, keepdim=True) - counts)

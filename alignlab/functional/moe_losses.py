"""Balance of a mixture of experts: losses of the router, and the update of its balancing bias.

Shapes: N tokens, E experts, K experts a token, D groups of experts, L MoE layers.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor


def switch_balance_loss(probs: Float[Tensor, "N E"], load_frac: Float[Tensor, "E"]) -> Float[Tensor, "N"]:
    """Load-balance loss of each token, to be minimised.

        loss = E * sum_i f_i * p_i

    Its mean over tokens is the Switch loss, 1 where the load is even. f is a constant that the caller keeps, the load
    of an earlier step over all its tokens: with the f of the tokens at hand, the gradient would depend on how a batch
    is cut into micro-batches. A caller whose f counts all micro-batches and ranks of a step has the balance of the
    global batch, of Qiu et al. (2025), arXiv:2501.11873, one step late.

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


def group_balance_loss(
    probs: Float[Tensor, "N E"], load_frac: Float[Tensor, "E"], *, num_groups: int
) -> Float[Tensor, "N"]:
    """Device-level balance loss of each token, to be minimised; the devices are groups of consecutive experts.

        loss = sum_d f'_d P'_d,  f'_d = 1/|E_d| * sum_{i in E_d} f_i,  f_i = E * load_i,  P'_d = sum_{i in E_d} p_i

    Its mean over tokens is the paper's loss, 1 where every group is chosen alike. As in `switch_balance_loss`, the load
    is a constant of an earlier step, so the gradient does not depend on how a batch is cut.

    Args:
        probs: as in `switch_balance_loss`.
        load_frac: as in `switch_balance_loss`.
        num_groups: D, which divides E.

    Reference: DeepSeek-AI (2024), DeepSeek-V2, arXiv:2405.04434, Sec. 2.2.3, L_DevBal.
    """
    share = load_frac.float() * len(load_frac)
    return _per_group(probs.float(), num_groups).sum(-1) @ _per_group(share, num_groups).mean(-1)


def communication_balance_loss(
    probs: Float[Tensor, "N E"], sent_frac: Float[Tensor, "D"], *, max_groups: int
) -> Float[Tensor, "N"]:
    """Communication balance loss of each token, to be minimised: devices should receive as many tokens as each other.

        loss = sum_d f''_d P''_d,  f''_d = D / M * (fraction of tokens sent to device d),  P''_d = sum_{i in E_d} p_i

    Its mean over tokens is the paper's loss, 1 where each of the D devices receives M / D of the tokens. The fraction
    is a constant of an earlier step, so the gradient does not depend on how a batch is cut.

    Args:
        probs: as in `switch_balance_loss`.
        sent_frac: fraction of the tokens with at least one chosen expert in each group; no gradient.
        max_groups: M, the most groups that a token is sent to.

    Reference: DeepSeek-AI (2024), DeepSeek-V2, arXiv:2405.04434, Sec. 2.2.3, L_CommBal.
    """
    num_groups = len(sent_frac)
    return _per_group(probs.float(), num_groups).sum(-1) @ (num_groups / max_groups * sent_frac.float())


def _per_group(values: Float[Tensor, "*N E"], num_groups: int) -> Float[Tensor, "*N D G"]:
    return values.unflatten(-1, (num_groups, -1))


def sequence_balance_loss(
    probs: Float[Tensor, "N E"], sequence_of_token: Int[Tensor, "N"], *, num_sequences: int, num_chosen: int,
    counted: Bool[Tensor, "N"] | None = None,
) -> Float[Tensor, "N"]:
    """Sequence-wise balance loss of each token, to be minimised.

        loss_t = sum_i f_i p_ti,  f_i = E / (K T) * sum_t 1(expert i is among the K best of token t)

    f and T are of the token's own sequence, so the mean over the tokens of a sequence is the paper's loss of it, and
    the gradient does not depend on which sequences share a micro-batch.

    Args:
        probs: scores normalised to 1, of which the K best are counted; carry the gradient.
        sequence_of_token: index of each token's sequence, from 0 to `num_sequences` - 1.
        num_sequences: number of sequences.
        num_chosen: K.
        counted: tokens that belong to their sequence's T; None counts all. Others have the loss 0.

    Reference: DeepSeek-AI (2024), DeepSeek-V3, arXiv:2412.19437, Eq. 17-20.
    """
    probs = probs.float()
    best = torch.zeros_like(probs).scatter(1, probs.topk(num_chosen, dim=-1).indices, 1.0)
    weight = torch.ones_like(probs[:, 0]) if counted is None else counted.to(probs.dtype)
    chosen = probs.new_zeros(num_sequences, probs.shape[1]).index_add(0, sequence_of_token, best * weight[:, None])
    lengths = probs.new_zeros(num_sequences).index_add(0, sequence_of_token, weight).clamp(min=1)
    load = probs.shape[1] / num_chosen * chosen / lengths[:, None]
    return (load[sequence_of_token] * probs).sum(-1) * weight


def importance_loss(gates: Float[Tensor, "N E"]) -> Float[Tensor, ""]:
    """Squared coefficient of variation of the experts' importance, their gates summed over a batch; to be minimised.

        loss = Var(importance) / Mean(importance)^2

    It is no sum over tokens, so its gradient depends on which tokens are a batch: here those of one micro-batch.

    Args:
        gates: weight of each expert, 0 where it is not chosen; carry the gradient.

    Reference: Shazeer et al. (2017), arXiv:1701.06538, Eq. 6-7.
    """
    return _squared_variation(gates.float().sum(0))


def expected_load_loss(
    logits: Float[Tensor, "N E"], noisy_logits: Float[Tensor, "N E"], noise_std: Float[Tensor, "N E"],
    *, num_chosen: int, counted: Bool[Tensor, "N"] | None = None,
) -> Float[Tensor, ""]:
    """Squared coefficient of variation of the experts' expected load under noise, to be minimised.

        P(x, i) = Phi((logit_i - kth_excluding(noisy_logits, K, i)) / noise_std_i);  loss = CV(sum_x P(x, i))^2

    It is no sum over tokens: see `importance_loss`.

    Args:
        logits: without noise; carry the gradient.
        noisy_logits: of which the K best are chosen.
        noise_std: standard deviation of each logit's noise, > 0.
        num_chosen: K. The loss is 0 where it is E, because every expert is chosen.
        counted: tokens that are summed over; None is all.

    Reference: Shazeer et al. (2017), arXiv:1701.06538, Eq. 8-11.
    """
    if num_chosen == logits.shape[-1]:
        return logits.sum() * 0.0
    best = noisy_logits.topk(num_chosen + 1, dim=-1).values
    is_chosen = noisy_logits >= best[:, num_chosen - 1 : num_chosen]
    # Without a chosen expert, the K-th best of the others is the (K+1)-th of all.
    threshold = torch.where(is_chosen, best[:, num_chosen:], best[:, num_chosen - 1 : num_chosen])
    chance = torch.special.ndtr((logits - threshold) / noise_std)
    return _squared_variation((chance if counted is None else chance * counted[:, None]).sum(0))


def _squared_variation(values: Float[Tensor, "E"]) -> Float[Tensor, ""]:
    return values.var(correction=0) / (values.mean().square() + 1e-10)


def ordered_choice_logprob(logits: Float[Tensor, "N E"], choices: Int[Tensor, "N K"]) -> Float[Tensor, "N"]:
    """Log-probability of drawing K experts one after the other, without replacement, from a softmax over logits.

        log p = sum_k (logit_{c_k} - log sum_{i not in c_1..c_{k-1}} exp(logit_i))

    This is the distribution of the K largest of logits plus Gumbel noise, in order.

    Args:
        logits: carry the gradient.
        choices: distinct experts of each token, in the order in which they were drawn.

    Reference: Kool et al. (2019), arXiv:1903.06059, Sec. 2.
    """
    logits = logits.float()
    total = torch.zeros_like(logits[:, 0])
    drawn = torch.zeros_like(logits, dtype=torch.bool)
    for column in choices.unbind(1):
        remaining = torch.logsumexp(logits.masked_fill(drawn, -torch.inf), dim=-1)
        total = total + logits.gather(1, column[:, None])[:, 0] - remaining
        drawn = drawn.scatter(1, column[:, None], True)
    return total


def routing_policy_loss(
    losses: Float[Tensor, "N"], choice_logprobs: Float[Tensor, "N L"], baselines: Float[Tensor, "N L"]
) -> Float[Tensor, "N"]:
    """Loss of each token that trains routers by REINFORCE, and their baselines by regression; to be minimised.

        loss_t = sum_l ( (losses_t - b_tl) * log pi_l(choice) + 1/2 (losses_t - b_tl)^2 )

    The reward of a routing choice is the negative loss of the token that is predicted from it. The advantage
    carries no gradient into the baseline, nor either into the weights under it.

    Args:
        losses: of each token; their gradient is not used.
        choice_logprobs: log-probability of the experts that were chosen for the token's predecessor, in each of L
            layers; carry the gradient.
        baselines: prediction of `losses` by each layer; carry the gradient.

    References: Williams (1992); of experts: Bengio et al. (2015), arXiv:1511.06297, Sec. 3; with a learnt baseline:
    Clark et al. (2022), arXiv:2202.01169, RL-R.
    """
    gap = losses.detach().float()[:, None] - baselines.float()
    return (gap.detach() * choice_logprobs.float() + 0.5 * gap.square()).sum(-1)

"""A router learnt by REINFORCE: choices are drawn from a softmax, and the losses that follow them are their costs.

Williams (1992); conditional computation: Bengio et al. (2015), arXiv:1511.06297, Sec. 3; mixtures of language models,
with a learnt baseline: Clark et al. (2022), arXiv:2202.01169, RL-R. `functional.moe_losses.routing_policy_loss` is the
loss. It needs the loss of each token, so the learner adds it (`policy_losses`).

Shapes: N tokens, H hidden size, E experts, K experts a token, L sparse layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from alignlab.functional.moe_losses import ordered_choice_logprob, routing_policy_loss
from alignlab.models.config import PolicyConfig
from alignlab.models.decoder import causal_lm
from alignlab.models.routers.coded import experts_of
from alignlab.models.routers.noise import gumbel_noise
from alignlab.models.routers.protocol import RoutedTokens, RouterScores, RoutingPolicy
from alignlab.models.routers.topk import TopKRouter


class ReinforceRouter(TopKRouter):
    """A router that draws K experts without replacement in training, and takes the K best otherwise.

    The draw of a token is the same in any micro-batch, see `noise`. A choice that is replayed is an action as well: the
    router's present log-probability of it is what the loss weighs.

    Attributes:
        baseline_weight: [1, H], predicts a token's loss from the detached hidden state.
        baseline_bias: [1].
        noise_key: [] int64, of the present optimizer step's draws.
    """

    starts_at_zero = ("baseline_weight",)
    noise_key: Tensor

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__(config)
        self.baseline_weight = nn.Parameter(torch.zeros(1, config.hidden_size))
        self.baseline_bias = nn.Parameter(torch.zeros(1))
        self.register_buffer("noise_key", torch.zeros((), dtype=torch.int64))

    def initialize(self) -> None:
        """Set a key at random, and the baseline to 0."""
        super().initialize()
        init.zeros_(self.baseline_weight)
        init.zeros_(self.baseline_bias)
        init.copy_(self.noise_key, torch.randint(2**62, ()))

    def forward(self, hidden: Tensor, tokens: RoutedTokens) -> RouterScores:
        scores = super().forward(hidden, tokens)
        if not tokens.trains:
            return scores
        baseline = F.linear(hidden.detach(), self.baseline_weight, self.baseline_bias)[:, 0].float()
        return scores._replace(baseline=baseline)

    def _ranked(self, scores: RouterScores, tokens: RoutedTokens) -> Tensor:
        if not (tokens.trains and self.explores):
            return scores.logits
        num_tokens, num_experts = scores.logits.shape
        return scores.logits + gumbel_noise(tokens, self.noise_key, num_tokens=num_tokens, num_experts=num_experts)

    def policy(self, scores: RouterScores, choices: Tensor) -> RoutingPolicy:
        """Return the log-probability of choices [N, K], and the baseline."""
        assert scores.baseline is not None, "a policy is learnt in training passes"
        return RoutingPolicy(ordered_choice_logprob(scores.logits, experts_of(choices)), scores.baseline)

    @torch.no_grad()
    def take_load(self, counts: Tensor) -> None:
        """Set the load from counts, and go on to the next step's draws."""
        super().take_load(counts)
        self.noise_key.add_(1)


def policy_losses(policy: RoutingPolicy, losses: Tensor, model: nn.Module) -> Tensor:
    """Return the weighted REINFORCE losses [N] of a pass's routers.

    Args:
        policy: [N, L] each, of the experts from which each token was predicted.
        losses: [N], of each token, as they are minimised.
        model: whose config weighs the losses.
    """
    coef: float = causal_lm(model).config.router_reinforce_coef
    return coef * routing_policy_loss(losses, policy.logprobs, policy.baselines)

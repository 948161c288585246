"""Noisy top-k: noise on the logits spreads choices over experts, in training passes alone.

Shazeer et al. (2017), arXiv:1701.06538, Eq. 3-5: H(x)_i = (x W_g)_i + normal noise * softplus((x W_noise)_i), and the
gates are a softmax over the K highest of H.

Shapes: N tokens, H hidden size, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from alignlab.functional.moe_losses import expected_load_loss, importance_loss
from alignlab.models.config import PolicyConfig
from alignlab.models.routers.noise import normal_noise
from alignlab.models.routers.protocol import RoutedTokens, RouterScores
from alignlab.models.routers.topk import TopKRouter


class NoisyTopKRouter(TopKRouter):
    """A top-k router whose logits have noise of a learnt size in training.

    A token whose choice is replayed has none, so that its gates are those of the router that made the record. The noise
    of a token is the same in any micro-batch, see `noise`.

    Attributes:
        noise_weight: [E, H], gives each logit's noise its size; at 0, as it starts, the size is log 2.
        noise_key: [] int64, of the present optimizer step's noise.
    """

    starts_at_zero = ("noise_weight",)
    noise_key: Tensor

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__(config)
        self.noise_weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.register_buffer("noise_key", torch.zeros((), dtype=torch.int64))

    def initialize(self) -> None:
        """Set a key at random, and the noise to the same size for all tokens."""
        super().initialize()
        init.zeros_(self.noise_weight)
        init.copy_(self.noise_key, torch.randint(2**62, ()))

    def forward(self, hidden: Tensor, tokens: RoutedTokens) -> RouterScores:
        """Return the scores of hidden states [N, H], in training with noise."""
        scores = super().forward(hidden, tokens)
        if not tokens.trains:
            return scores
        std = F.softplus(F.linear(hidden, self.noise_weight).float())
        num_tokens, num_experts = scores.logits.shape
        noise = normal_noise(tokens, self.noise_key, num_tokens=num_tokens, num_experts=num_experts)
        # Times 0 instead of left out: under DDP every weight takes part in every training pass.
        noise = noise * float(self.explores)
        if tokens.recorded is not None:
            noise = noise.masked_fill(tokens.recorded[:, None], 0.0)
        logits = scores.logits + noise * std
        return RouterScores(logits, self.scoring.scores(logits), clean_logits=scores.logits, noise_std=std)

    def losses(self, scores: RouterScores, tokens: RoutedTokens) -> Tensor | None:
        """Return the losses of a top-k router, and those of importance and load, alike for all tokens of the pass."""
        total, config = super().losses(scores, tokens), self.config
        if scores.noise_std is None or max(config.router_importance_loss_coef, config.router_load_loss_coef) <= 0:
            return total
        loss = self._importance(scores, tokens) + self._load(scores, tokens)
        spread = loss.expand(len(scores.logits))
        return spread if total is None else total + spread

    def _importance(self, scores: RouterScores, tokens: RoutedTokens) -> Tensor:
        best = scores.logits.topk(self.config.num_experts_per_tok, dim=-1).indices
        gates = torch.zeros_like(scores.logits).scatter(1, best, self.scoring.normalized_gates(scores, best))
        counted = gates if tokens.counted is None else gates * tokens.counted[:, None]
        return self.config.router_importance_loss_coef * importance_loss(counted)

    def _load(self, scores: RouterScores, tokens: RoutedTokens) -> Tensor:
        assert scores.clean_logits is not None and scores.noise_std is not None
        loss = expected_load_loss(
            scores.clean_logits, scores.logits, scores.noise_std, num_chosen=self.config.num_experts_per_tok,
            counted=tokens.counted,
        )
        return self.config.router_load_loss_coef * loss

    @torch.no_grad()
    def take_load(self, counts: Tensor) -> None:
        """Set the load from counts, and go on to the next step's noise."""
        super().take_load(counts)
        self.noise_key.add_(1)

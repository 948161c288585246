"""Expert choice: every expert takes its best tokens of a pass, so a token may have many experts or none.

Zhou et al. (2022), arXiv:2202.09368, Sec. 3.2: scores are a softmax over experts, and each expert takes the k = N c / E
tokens with its highest scores; c is `num_experts_per_tok`. An expert's choice depends on later tokens, so the router is
not causal: it serves for training, and what compares or samples by log-probs refuses it (`uses`).

Shapes: N tokens, E experts, C tokens an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignlab.models.routers.capacity import expert_capacity
from alignlab.models.routers.coded import coded
from alignlab.models.routers.protocol import RoutedTokens, RouterScores
from alignlab.models.routers.topk import TopKRouter


class ExpertChoiceRouter(TopKRouter):
    """A router whose choices are [N, E]: every expert, dropped where it does not take the token."""

    @torch.no_grad()
    def choose(self, scores: RouterScores, tokens: RoutedTokens) -> Tensor:
        num_tokens, num_experts = scores.scores.shape
        room = tokens_per_expert(num_tokens, num_experts=num_experts, num_chosen=self.config.num_experts_per_tok)
        best = scores.scores.topk(room, dim=0).indices
        takes = torch.zeros_like(scores.scores, dtype=torch.bool).scatter(0, best, True)
        return coded(torch.arange(num_experts, device=takes.device).expand_as(takes), takes)

    @torch.no_grad()
    def count(self, choices: Tensor, counted: Tensor | None = None) -> None:
        """Add the tokens that each expert takes."""
        takes = choices >= 0 if counted is None else (choices >= 0) & counted[:, None]
        self._counts = self.counts() + takes.sum(0)


def tokens_per_expert(num_tokens: int, *, num_experts: int, num_chosen: int) -> int:
    """Return the number of tokens C that each expert takes."""
    return expert_capacity(num_tokens, num_chosen=num_chosen, num_experts=num_experts, factor=1.0)

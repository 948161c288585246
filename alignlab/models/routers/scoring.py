"""Scores and gates from a router's logits.

Shapes: N tokens, E experts, K experts a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor
from torch.nn import functional as F

from alignlab.models.routers.protocol import RouterScores


class Scoring(ABC):
    """A way from logits to scores, to gates that sum to 1, and to probabilities for balance losses."""

    @abstractmethod
    def scores(self, logits: Tensor) -> Tensor:
        """Return the scores of logits [N, E]."""

    @abstractmethod
    def normalized_gates(self, scores: RouterScores, experts: Tensor) -> Tensor:
        """Return gates [N, K] of experts [N, K] that sum to 1 over a token's experts."""

    @abstractmethod
    def probs(self, scores: RouterScores) -> Tensor:
        """Return scores [N, E] that sum to 1, for the balance losses."""


class Softmax(Scoring):
    """Scores are a softmax over all experts; normalised gates are a softmax over the chosen ones."""

    def scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=-1)

    def normalized_gates(self, scores: RouterScores, experts: Tensor) -> Tensor:
        return scores.logits.gather(1, experts).softmax(dim=-1)

    def probs(self, scores: RouterScores) -> Tensor:
        return scores.scores


class Sigmoid(Scoring):
    """Scores are a sigmoid, each expert's apart; normalised gates are the chosen scores over their sum."""

    def scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def normalized_gates(self, scores: RouterScores, experts: Tensor) -> Tensor:
        chosen = scores.scores.gather(1, experts)
        return chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20)

    def probs(self, scores: RouterScores) -> Tensor:
        return scores.scores / scores.scores.sum(dim=-1, keepdim=True)


class SqrtSoftplus(Sigmoid):
    """Scores are the square root of a softplus, each expert's apart, as in DeepSeek-V4; gates as under a sigmoid."""

    def scores(self, logits: Tensor) -> Tensor:
        return F.softplus(logits).sqrt()


SCORINGS: dict[str, Scoring] = {"softmax": Softmax(), "sigmoid": Sigmoid(), "sqrtsoftplus": SqrtSoftplus()}
"""By `scoring_func`."""

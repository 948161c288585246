"""BASE layers: in training every expert takes as many tokens as any other, with the highest total score.

Lewis et al. (2021), arXiv:2103.16716: one expert a token, gate sigmoid(h w_e), and greedy choice in inference.

Shapes: N tokens, E experts.
"""

from __future__ import annotations

from torch import Tensor

from alignlab.models.routers.auction import balanced_assignment
from alignlab.models.routers.protocol import RoutedTokens, RouterScores
from alignlab.models.routers.topk import TopKRouter


class BaseRouter(TopKRouter):
    """A router whose choices in training are the balanced assignment of all tokens of a pass; see `auction`.

    The assignment is of the tokens of one micro-batch, so it depends on how a batch is cut.
    """

    def _ranked(self, scores: RouterScores, tokens: RoutedTokens) -> Tensor:
        if not (tokens.trains and self.explores):
            return scores.logits
        experts = balanced_assignment(scores.logits)
        return scores.logits.new_zeros(scores.logits.shape).scatter(1, experts[:, None], 1.0)

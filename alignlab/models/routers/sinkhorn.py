"""Sinkhorn routing (S-BASE): in training a token takes the best experts of a nearly balanced transport plan.

Clark et al. (2022), arXiv:2202.01169, S-BASE; the iteration is Cuturi's (2013), arXiv:1306.0895, with entropy weight 1.

Shapes: N tokens, E experts.
"""

from __future__ import annotations

from torch import Tensor

from alignlab.models.routers.protocol import RoutedTokens, RouterScores
from alignlab.models.routers.topk import TopKRouter


class SinkhornRouter(TopKRouter):
    """A router whose choices in training are the K highest entries of each row of a transport plan.

    The plan is of the tokens of one micro-batch, so it depends on how a batch is cut. Gates come from the scores, and
    inference is greedy.
    """

    def _ranked(self, scores: RouterScores, tokens: RoutedTokens) -> Tensor:
        if not (tokens.trains and self.explores):
            return scores.logits
        return log_transport_plan(scores.logits, num_rounds=self.config.router_sinkhorn_rounds)


def log_transport_plan(logits: Tensor, *, num_rounds: int) -> Tensor:
    """Return the logarithm of exp(logits) scaled so that columns sum to N / E and rows to 1, [N, E] float64.

    Args:
        logits: [N, E].
        num_rounds: of scaling columns and then rows, so the rows' sums are exact, and the columns' nearly.
    """
    plan = logits.double()
    share = plan.new_tensor(plan.shape[0] / plan.shape[1]).log()
    for _ in range(num_rounds):
        plan = plan - plan.logsumexp(0, keepdim=True) + share
        plan = plan - plan.logsumexp(1, keepdim=True)
    return plan

"""Routers: which experts of a mixture compute a token, with what weight, and how evenly they are used.

A mixture layer has one router. A new way to route is a class with the methods of `Router`: what records,
replays and counts choices (`routing`, `moe`) calls those methods alone.

Shapes: N tokens, H hidden size, E experts, K experts a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from alignlab.functional.moe_losses import router_bias_update, router_z_loss, switch_balance_loss
from alignlab.models.config import PolicyConfig


class RouterScores(NamedTuple):
    """Tokens against experts.

    Attributes:
        logits: [N, E] float32.
        scores: [N, E] float32, the logits' softmax or sigmoid.
    """

    logits: Tensor
    scores: Tensor


@runtime_checkable
class Router(Protocol):
    """Chooses the experts of tokens. It is a module: `__call__` scores, so that hooks on modules see it."""

    def __call__(self, hidden: Tensor) -> RouterScores:
        """Return the scores of hidden states [N, H]."""
        ...

    def choose(self, scores: RouterScores) -> Tensor:
        """Return the experts of each token, [N, K] int64, without a gradient."""
        ...

    def gates(self, scores: RouterScores, choices: Tensor) -> Tensor:
        """Return the weight of each chosen expert, [N, K] float32.

        Args:
            choices: [N, K], of `choose` or of a record that is replayed; the gates are live in both cases.
        """
        ...

    def losses(self, scores: RouterScores) -> Tensor | None:
        """Return the weighted router losses of each token, [N]; None where the config weighs none."""
        ...

    def count(self, choices: Tensor, counted: Tensor | None = None) -> None:
        """Add choices [N, K] to those of this optimizer step.

        Args:
            counted: [N] bool, tokens whose choices count; None counts all.
        """
        ...

    def counts(self) -> Tensor:
        """Return how often each expert was chosen in this optimizer step, [E] int64."""
        ...

    def forget_counts(self) -> None:
        """Set the counts to zero."""
        ...

    def take_load(self, counts: Tensor) -> None:
        """Take the use of experts for the next step's balance loss from counts [E] of all ranks, if any is above 0."""
        ...

    def move_bias(self, counts: Tensor) -> None:
        """Move the balancing bias, if there is one, towards equal use, by counts [E] of all ranks."""
        ...


class TopKRouter(nn.Module, ABC):
    """A linear router: each token takes the K experts of the highest score.

    Load and bias stay float32 whatever the model's dtype. A subclass says how logits become scores and gates.
    `Router` describes the methods.

    Attributes:
        e_score_correction_bias: [E], added to the scores that choose, never to the gates; None without such balancing.
            Wang et al. (2024), arXiv:2408.15664.
        expert_load: [E], fraction of the last optimizer step's choices that went to each expert.
    """

    e_score_correction_bias: Tensor | None
    expert_load: Tensor

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.register_buffer("expert_load", torch.full((config.num_experts,), 1 / config.num_experts))
        biased = config.router_bias_update_rate > 0
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts) if biased else None)
        self._counts: Tensor | None = None

    def initialize(self) -> None:
        """Set weight, load and bias to what a new model starts with."""
        init.normal_(self.weight, std=self.config.initializer_range)
        init.constant_(self.expert_load, 1 / self.config.num_experts)
        if self.e_score_correction_bias is not None:
            init.zeros_(self.e_score_correction_bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                setattr(self, name, buffer.to(moved.device))
        return self

    def forward(self, hidden: Tensor) -> RouterScores:
        logits = F.linear(hidden, self.weight).float()
        return RouterScores(logits, self._scores(logits))

    @torch.no_grad()
    def choose(self, scores: RouterScores) -> Tensor:
        """Return the K best experts of each token, [N, K] int64."""
        bias = self.e_score_correction_bias
        ranked = scores.scores if bias is None else scores.scores + bias
        return ranked.topk(self.config.num_experts_per_tok, dim=-1).indices

    def gates(self, scores: RouterScores, choices: Tensor) -> Tensor:
        if self.config.norm_topk_prob:
            gates = self._normalized_gates(scores, choices)
        else:
            gates = scores.scores.gather(1, choices)
        return gates * self.config.routed_scaling_factor

    def losses(self, scores: RouterScores) -> Tensor | None:
        balance_coef, z_coef = self.config.router_aux_loss_coef, self.config.router_z_loss_coef
        if balance_coef <= 0 and z_coef <= 0:
            return None
        balance = switch_balance_loss(self._probs(scores), self.expert_load)
        return balance_coef * balance + z_coef * router_z_loss(scores.logits)

    @abstractmethod
    def _scores(self, logits: Tensor) -> Tensor: ...

    @abstractmethod
    def _normalized_gates(self, scores: RouterScores, choices: Tensor) -> Tensor:
        """Return gates [N, K] that sum to 1."""

    @abstractmethod
    def _probs(self, scores: RouterScores) -> Tensor:
        """Return scores [N, E] that sum to 1, for the balance loss."""

    @torch.no_grad()
    def count(self, choices: Tensor, counted: Tensor | None = None) -> None:
        ones = torch.ones_like(choices) if counted is None else counted[:, None].expand_as(choices).to(choices.dtype)
        if self._counts is None:
            self._counts = torch.zeros_like(self.expert_load, dtype=torch.int64)
        # A sum, because a selection of the counted choices would make the host wait for their number.
        self._counts = self._counts.scatter_add(0, choices.flatten(), ones.flatten())

    def counts(self) -> Tensor:
        return torch.zeros_like(self.expert_load, dtype=torch.int64) if self._counts is None else self._counts

    def forget_counts(self) -> None:
        self._counts = None

    @torch.no_grad()
    def take_load(self, counts: Tensor) -> None:
        """Set `expert_load` from counts [E]; a layer that counted nothing keeps its load."""
        counts = counts.to(self.expert_load.device)
        total = counts.sum()
        self.expert_load.copy_(torch.where(total > 0, counts / total.clamp(min=1), self.expert_load))

    @torch.no_grad()
    def move_bias(self, counts: Tensor) -> None:
        """Move the balancing bias, if there is one; a layer that counted nothing keeps its bias."""
        bias = self.e_score_correction_bias
        if bias is not None:
            bias.copy_(router_bias_update(bias, counts.to(bias.device), rate=self.config.router_bias_update_rate))


class SoftmaxRouter(TopKRouter):
    """Scores are a softmax over all experts; normalised gates are a softmax over the chosen ones."""

    def _scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=-1)

    def _normalized_gates(self, scores: RouterScores, choices: Tensor) -> Tensor:
        return scores.logits.gather(1, choices).softmax(dim=-1)

    def _probs(self, scores: RouterScores) -> Tensor:
        return scores.scores


class SigmoidRouter(TopKRouter):
    """Scores are a sigmoid, each expert's apart; normalised gates are the chosen scores over their sum."""

    def _scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def _normalized_gates(self, scores: RouterScores, choices: Tensor) -> Tensor:
        chosen = scores.scores.gather(1, choices)
        return chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20)

    def _probs(self, scores: RouterScores) -> Tensor:
        return scores.scores / scores.scores.sum(dim=-1, keepdim=True)


def make_router(config: PolicyConfig) -> TopKRouter:
    """Return the router that `config.scoring_func` names."""
    return (SigmoidRouter if config.scoring_func == "sigmoid" else SoftmaxRouter)(config)

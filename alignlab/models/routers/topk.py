"""Top-k routers: each token takes the K experts of the highest score, of all or of its best groups.

Shapes: N tokens, H hidden size, E experts, K experts a token, D groups of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from alignlab.functional.moe_losses import (
    communication_balance_loss,
    group_balance_loss,
    router_bias_update,
    router_z_loss,
    sequence_balance_loss,
    switch_balance_loss,
)
from alignlab.models.config import PolicyConfig
from alignlab.models.routers.capacity import expert_capacity, within_capacity
from alignlab.models.routers.coded import coded, experts_of
from alignlab.models.routers.protocol import RoutedTokens, RouterScores
from alignlab.models.routers.scoring import SCORINGS


class TopKRouter(nn.Module):
    """A linear router: each token takes the K experts of the highest score.

    With `topk_method` the experts come from the token's best groups alone, and with `capacity_factor` an expert takes
    so many tokens alone. Load and bias stay float32 whatever the model's dtype. `protocol.Router` describes the
    methods.

    Attributes:
        bias: [E], of the product that gives the logits; None without.
        scoring: how logits become scores and gates, by `scoring_func`.
        e_score_correction_bias: [E], added to the scores that choose, never to the gates; None without such balancing.
            Wang et al. (2024), arXiv:2408.15664.
        expert_load: [E], fraction of the last optimizer step's choices that went to each expert.
        group_load: [D], fraction of that step's tokens that had an expert in each group; None unless communication is
            balanced.
        explores: whether training passes may choose otherwise than the router does when it serves; a trainer that
            compares log-probs switches it off.
    """

    e_score_correction_bias: Tensor | None
    expert_load: Tensor
    group_load: Tensor | None

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.scoring = SCORINGS[config.scoring_func]
        self.explores = True
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.num_experts)) if config.router_linear_bias else None
        self.register_buffer("expert_load", torch.full((config.num_experts,), 1 / config.num_experts))
        biased = config.has_router_bias
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts) if biased else None)
        self.register_buffer("group_load", self._even_groups() if config.router_comm_aux_loss_coef > 0 else None)
        self._counts: Tensor | None = None

    def _even_groups(self) -> Tensor:
        """Return the fraction of the tokens that each group gets if all get as many."""
        assert self.config.n_group is not None and self.config.topk_group is not None
        return torch.full((self.config.n_group,), self.config.topk_group / self.config.n_group)

    def initialize(self) -> None:
        """Set weight, loads and bias to what a new model starts with."""
        init.normal_(self.weight, std=self.config.initializer_range)
        if self.bias is not None:
            init.zeros_(self.bias)
        init.constant_(self.expert_load, 1 / self.config.num_experts)
        if self.e_score_correction_bias is not None:
            init.zeros_(self.e_score_correction_bias)
        if self.group_load is not None:
            init.copy_(self.group_load, self._even_groups())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def forward(self, hidden: Tensor, tokens: RoutedTokens) -> RouterScores:
        if self.config.router_in_fp32:
            bias = None if self.bias is None else self.bias.float()
            logits = F.linear(hidden.float(), self.weight.float(), bias)
        else:
            logits = F.linear(hidden, self.weight, self.bias).float()
        return RouterScores(logits, self.scoring.scores(logits))

    @torch.no_grad()
    def choose(self, scores: RouterScores, tokens: RoutedTokens) -> Tensor:
        """Return the K best experts of each token, [N, K] int64, dropped where an expert has no room."""
        ranked = self._ranked(scores, tokens)
        experts = ranked.topk(self.config.num_experts_per_tok, dim=-1).indices
        factor = self.config.capacity_factor
        if factor is None:
            return experts
        num_experts = self.config.num_experts
        capacity = expert_capacity(
            len(experts), num_chosen=experts.shape[1], num_experts=num_experts, factor=float(factor)
        )
        by_score = self.config.capacity_priority == "score"
        has_room = within_capacity(
            experts, scores.scores.gather(1, experts), num_experts=num_experts, capacity=capacity, by_score=by_score
        )
        return coded(experts, has_room)

    def _ranked(self, scores: RouterScores, tokens: RoutedTokens) -> Tensor:
        """Return the numbers [N, E] of which the K highest choose."""
        bias = self.e_score_correction_bias
        ranked = scores.scores if bias is None else scores.scores + bias
        method = self.config.topk_method
        if method == "greedy":
            return ranked
        assert self.config.n_group is not None and self.config.topk_group is not None
        return in_best_groups(
            ranked, num_groups=self.config.n_group, max_groups=self.config.topk_group, num_best=_GROUP_BEST[method]
        )

    def gates(self, scores: RouterScores, choices: Tensor) -> Tensor:
        experts = experts_of(choices) if self._may_drop else choices
        if self.config.norm_topk_prob:
            gates = self.scoring.normalized_gates(scores, experts)
        else:
            gates = scores.scores.gather(1, experts)
        gates = gates * self.config.routed_scaling_factor
        return gates.masked_fill(choices < 0, 0.0) if self._may_drop else gates

    @property
    def _may_drop(self) -> bool:
        return self.config.drops_choices

    def losses(self, scores: RouterScores, tokens: RoutedTokens) -> Tensor | None:
        """Return the weighted balance losses and z-loss of each token, [N]; None where the config weighs none."""
        config = self.config
        total: Tensor | None = None
        if config.router_aux_loss_coef > 0 or config.router_z_loss_coef > 0:
            balance = switch_balance_loss(self.scoring.probs(scores), self.expert_load)
            z_loss = router_z_loss(scores.logits)
            total = config.router_aux_loss_coef * balance + config.router_z_loss_coef * z_loss
        for loss in self._group_losses(scores) + self._sequence_losses(scores, tokens):
            total = loss if total is None else total + loss
        return total

    def _group_losses(self, scores: RouterScores) -> list[Tensor]:
        """Return the weighted losses [N] that balance groups of experts."""
        config, losses = self.config, []
        if config.router_device_aux_loss_coef > 0:
            assert config.n_group is not None
            balance = group_balance_loss(self.scoring.probs(scores), self.expert_load, num_groups=config.n_group)
            losses.append(config.router_device_aux_loss_coef * balance)
        if self.group_load is not None:
            assert config.topk_group is not None
            probs = self.scoring.probs(scores)
            balance = communication_balance_loss(probs, self.group_load, max_groups=config.topk_group)
            losses.append(config.router_comm_aux_loss_coef * balance)
        return losses

    def _sequence_losses(self, scores: RouterScores, tokens: RoutedTokens) -> list[Tensor]:
        """Return the weighted loss [N] that balances each sequence."""
        coef, segments = self.config.router_seq_aux_loss_coef, tokens.segments
        if coef <= 0:
            return []
        if segments is not None:
            sequences, num_sequences = segments.segment_of_token, len(segments.lengths)
        else:
            rows = torch.arange(tokens.num_rows, device=scores.logits.device)
            sequences, num_sequences = rows.repeat_interleave(len(scores.logits) // len(rows)), len(rows)
        balance = sequence_balance_loss(
            self.scoring.probs(scores), sequences, num_sequences=num_sequences,
            num_chosen=self.config.num_experts_per_tok, counted=tokens.counted,
        )
        return [coef * balance]

    @torch.no_grad()
    def count(self, choices: Tensor, counted: Tensor | None = None) -> None:
        """Add choices [N, K], dropped ones too: balance is about what tokens ask for."""
        ones = torch.ones_like(choices) if counted is None else counted[:, None].expand_as(choices).to(choices.dtype)
        if self._counts is None:
            self._counts = self._no_counts()
        experts = experts_of(choices) if self._may_drop else choices
        # A sum, because a selection of the counted choices would make the host wait for their number.
        self._counts = self._counts.scatter_add(0, experts.flatten(), ones.flatten())
        if self.group_load is not None:
            self._count_groups(experts, ones[:, 0])

    def _count_groups(self, experts: Tensor, ones: Tensor) -> None:
        """Add the tokens that have an expert in each group."""
        assert self._counts is not None and self.group_load is not None
        num_groups = len(self.group_load)
        groups = experts // (self.config.num_experts // num_groups)
        sent = torch.zeros(len(groups), num_groups, dtype=ones.dtype, device=ones.device).scatter(1, groups, 1)
        own = torch.zeros_like(self._counts)
        own[-num_groups:] = (sent * ones[:, None]).sum(0)
        self._counts = self._counts + own

    def _no_counts(self) -> Tensor:
        size = self.config.num_experts + (0 if self.group_load is None else len(self.group_load))
        return torch.zeros(size, dtype=torch.int64, device=self.expert_load.device)

    def counts(self) -> Tensor:
        return self._no_counts() if self._counts is None else self._counts

    def forget_counts(self) -> None:
        self._counts = None

    @torch.no_grad()
    def take_load(self, counts: Tensor) -> None:
        """Set the loads from counts [E] or [E + D]; a layer that counted nothing keeps its loads."""
        counts = counts.to(self.expert_load.device)
        of_experts, of_groups = counts[: self.config.num_experts], counts[self.config.num_experts :]
        total = of_experts.sum()
        self.expert_load.copy_(torch.where(total > 0, of_experts / total.clamp(min=1), self.expert_load))
        if self.group_load is not None:
            num_tokens = total / self.config.num_experts_per_tok
            self.group_load.copy_(torch.where(total > 0, of_groups / num_tokens.clamp(min=1), self.group_load))

    @torch.no_grad()
    def move_bias(self, counts: Tensor) -> None:
        """Move the balancing bias, if there is one; a layer that counted nothing keeps its bias."""
        bias = self.e_score_correction_bias
        if bias is not None:
            counts = counts[: self.config.num_experts].to(bias.device)
            bias.copy_(router_bias_update(bias, counts, rate=self.config.router_bias_update_rate))


_GROUP_BEST = {"group_limited_greedy": 1, "noaux_tc": 2}
"""Experts whose scores make the score of a group, by `topk_method`."""


def in_best_groups(ranked: Tensor, *, num_groups: int, max_groups: int, num_best: int) -> Tensor:
    """Return the numbers [N, E] of the experts in each token's best groups, and -inf for all others.

    A group is E / D consecutive experts, those of one device. Its score is the sum of its `num_best` highest numbers.

    Args:
        ranked: [N, E], with any bias.
        num_groups: D.
        max_groups: groups that a token may use.
        num_best: 1 in DeepSeek-V2 (arXiv:2405.04434, Sec. 2.2.2), 2 in DeepSeek-V3 (arXiv:2412.19437, Sec. 2.1.2).
    """
    groups = ranked.unflatten(1, (num_groups, -1))
    strength = groups.topk(num_best, dim=-1).values.sum(-1)
    best = strength.topk(max_groups, dim=-1).indices
    is_open = torch.zeros_like(strength, dtype=torch.bool).scatter(1, best, True)
    return groups.masked_fill(~is_open[..., None], -torch.inf).flatten(1)

"""Mixture-of-experts feed-forward: a router that chooses, experts computed in groups, and a record of the choices.

Shapes: N tokens, H hidden size, E experts, K experts a token, I intermediate size, L sparse layers, M = N * K rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alignlab.functional.moe_losses import router_bias_update, router_z_loss, switch_balance_loss
from alignlab.models.config import PolicyConfig
from alignlab.models.layers import FeedForward


@dataclass(eq=False)
class RoutingRecord:
    """Expert choices of one forward pass, in and out. The L layers are the sparse ones, counted from 0.

    Attributes:
        replay: [N, L, K] int16, choices to use; -1 where a token has no record and makes its own. Their gates come from
            the live router, so that it keeps its gradient (R3, arXiv:2510.11370).
        counted: [N] bool, tokens whose choices are counted in training; None counts all.
        chosen: by layer, [N, K] int64, the choices made.
        differs: by layer, [N] bool, where the router would have chosen other experts than those replayed.
        losses: by layer, [N] float32, weighted router losses of each token, with gradient.
        counting: this pass trains, so its choices are added to the layers' counts; set by the decoder.

    Activation checkpointing runs a layer again within the same pass: it finds its choices here and repeats them.
    """

    replay: Tensor | None = None
    counted: Tensor | None = None
    chosen: dict[int, Tensor] = field(default_factory=dict)
    differs: dict[int, Tensor] = field(default_factory=dict)
    losses: dict[int, Tensor] = field(default_factory=dict)
    counting: bool = False

    def begin(self, *, counting: bool) -> None:
        """Called once by the decoder."""
        assert not self.chosen, "a RoutingRecord holds one forward pass; make a new one for each"
        self.counting = counting

    def stacked_choices(self) -> Tensor:
        """[N, L, K] int16, on the CPU or wherever the model is."""
        return torch.stack([self.chosen[layer] for layer in sorted(self.chosen)], dim=1).to(torch.int16)

    def disagreement(self) -> Tensor | None:
        """[N] float32, fraction of the layers where the router differs from what is replayed; None without replay."""
        if not self.differs:
            return None
        return torch.stack([self.differs[layer] for layer in sorted(self.differs)]).float().mean(0)

    def total_loss(self) -> Tensor | None:
        """[N], summed over the layers; None where the config weighs no router loss."""
        return torch.stack([self.losses[layer] for layer in sorted(self.losses)]).sum(0) if self.losses else None


class Router(nn.Module):
    """Scores tokens against experts and chooses. Loads and bias stay float32 whatever the model's dtype.

    Attributes:
        e_score_correction_bias: [E], added to the scores that choose, never to the gates; None without such balancing.
        expert_load: [E], fraction of the last optimizer step's choices that went to each expert.
        expert_counts: [E] int64, choices since that step; None before the first.
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
        self.expert_counts: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                setattr(self, name, buffer.to(moved.device))
        return self

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(logits, scores) [N, E] float32 of hidden [N, H]; scores are the softmax or sigmoid of the logits."""
        logits = F.linear(hidden, self.weight).float()
        return logits, logits.sigmoid() if self.config.scoring_func == "sigmoid" else logits.softmax(dim=-1)

    @torch.no_grad()
    def choose(self, scores: Tensor) -> Tensor:
        """[N, K] int64: the best experts."""
        if self.e_score_correction_bias is not None:
            scores = scores + self.e_score_correction_bias
        return scores.topk(self.config.num_experts_per_tok, dim=-1).indices

    def gates(self, logits: Tensor, scores: Tensor, choices: Tensor) -> Tensor:
        """[N, K] float32: the weight of each chosen expert, from the live logits."""
        if not self.config.norm_topk_prob:
            gates = scores.gather(1, choices)
        elif self.config.scoring_func == "softmax":
            gates = logits.gather(1, choices).softmax(dim=-1)
        else:
            gates = scores.gather(1, choices)
            gates = gates / (gates.sum(dim=-1, keepdim=True) + 1e-20)
        return gates * self.config.routed_scaling_factor

    def losses(self, logits: Tensor, scores: Tensor) -> Tensor:
        """[N]: weighted balance loss and z-loss of each token."""
        config = self.config
        probs = scores if config.scoring_func == "softmax" else scores / scores.sum(dim=-1, keepdim=True)
        balance = switch_balance_loss(probs, self.expert_load)
        return config.router_aux_loss_coef * balance + config.router_z_loss_coef * router_z_loss(logits)

    @torch.no_grad()
    def count(self, choices: Tensor) -> None:
        """Add choices to this step's counts."""
        counts = torch.bincount(choices.flatten(), minlength=self.config.num_experts)
        self.expert_counts = counts if self.expert_counts is None else self.expert_counts + counts


class _Regroup(torch.autograd.Function):
    """rows[order // copies]: rows sorted by expert, or back. The backward gathers too, so its sums keep one order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return rows.index_select(0, order // copies if copies > 1 else order)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        grad = grad.index_select(0, inverse)
        return grad.unflatten(0, (-1, ctx.copies)).sum(1) if ctx.copies > 1 else grad, None, None, None


class LowRank(NamedTuple):
    """A term that an adapter adds to a stacked weight: expert e has W_e + scale * up_e down_e.

    Attributes:
        down: [E, rank, in].
        up: [E, out, rank].
        scale: of the product.
    """

    down: Tensor
    up: Tensor
    scale: float


class Experts(nn.Module):
    """SwiGLU experts, weights stacked: gate_up_proj [E, 2I, H], down_proj [E, H, I].

    Rows are sorted by expert, and each projection is one grouped product: no expert sees another's tokens, and the
    counts never leave the device.
    """

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        assert config.moe_intermediate_size is not None
        self.num_experts = config.num_experts
        sizes = (config.num_experts, config.moe_intermediate_size, config.hidden_size)
        self.gate_up_proj = nn.Parameter(torch.empty(sizes[0], 2 * sizes[1], sizes[2]))
        self.down_proj = nn.Parameter(torch.empty(sizes[0], sizes[2], sizes[1]))

    def forward(
        self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, low_rank: Mapping[str, LowRank] | None = None
    ) -> Tensor:
        """Weighted sum of each token's experts.

        Args:
            hidden: [N, H].
            topk_ids, topk_weights: [N, K].
            low_rank: an adapter's terms, by the name of the parameter that each is added to.
        """
        low_rank = low_rank or {}
        copies = topk_ids.shape[1]
        order = topk_ids.flatten().argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        ends = torch.bincount(topk_ids.flatten(), minlength=self.num_experts).cumsum(0, dtype=torch.int32)
        rows = _Regroup.apply(hidden, order, inverse, copies)
        gate, up = _grouped(rows, self.gate_up_proj, ends, low_rank.get("gate_up_proj")).chunk(2, dim=-1)
        rows = _grouped(F.silu(gate) * up, self.down_proj, ends, low_rank.get("down_proj"))
        outputs = _Regroup.apply(rows, inverse, order, 1).unflatten(0, (-1, copies))
        return (outputs * topk_weights.to(outputs.dtype).unsqueeze(-1)).sum(1)


def _grouped(rows: Tensor, weight: Tensor, ends: Tensor, term: LowRank | None) -> Tensor:
    """rows [M, in], sorted by expert, times the weight [E, out, in] of each row's expert -> [M, out].

    Args:
        ends: [E] int32, where each expert's rows end.
        term: is added to the weight; its two products are made apart, which costs rank / out of the weight's.
    """
    output = F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    if term is None:
        return output
    multiple = 16 // rows.element_size()  # a grouped product reads rows of 16 bytes
    padding = -term.down.shape[1] % multiple
    down, up = F.pad(term.down, (0, 0, 0, padding)), F.pad(term.up, (0, padding)).contiguous()
    inner = F.grouped_mm(rows, down.contiguous().transpose(1, 2), offs=ends)
    return output + term.scale * F.grouped_mm(inner, up.transpose(1, 2), offs=ends)


class SparseFeedForward(nn.Module):
    """Routed experts, plus shared ones that every token passes.

    References: Shazeer et al. (2017), arXiv:1701.06538; fine-grained and shared experts: Dai et al. (2024),
    arXiv:2401.06066.
    """

    def __init__(self, config: PolicyConfig, moe_index: int) -> None:
        super().__init__()
        assert config.moe_intermediate_size is not None
        self.moe_index = moe_index
        self.weigh_losses = config.router_aux_loss_coef > 0 or config.router_z_loss_coef > 0
        self.gate = Router(config)
        self.experts = Experts(config)
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = FeedForward(config.hidden_size, shared) if shared else None

    def forward(self, hidden_states: Tensor, routing: RoutingRecord | None = None) -> Tensor:
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits, scores = self.gate(hidden)
        choices = self._choose(logits, scores, routing)
        output = self.experts(hidden, choices, self.gate.gates(logits, scores, choices))
        if self.shared_experts is not None:
            output = output + self.shared_experts(hidden)
        return output.view_as(hidden_states)

    def _choose(self, logits: Tensor, scores: Tensor, routing: RoutingRecord | None) -> Tensor:
        """The choices, put on record with the losses unless this is a recomputation."""
        if routing is None:
            return self.gate.choose(scores)
        # A recomputation makes the losses too: activation checkpointing needs the same graph, and keeps the first.
        losses = self.gate.losses(logits, scores) if self.weigh_losses and torch.is_grad_enabled() else None
        if self.moe_index in routing.chosen:
            return routing.chosen[self.moe_index]
        choices = self.gate.choose(scores)
        if routing.replay is not None:
            own, choices = choices, replayed(choices, routing.replay[:, self.moe_index])
            routing.differs[self.moe_index] = (own.sort(-1).values != choices.sort(-1).values).any(-1)
        routing.chosen[self.moe_index] = choices
        if losses is not None:
            routing.losses[self.moe_index] = losses
        if routing.counting:
            self.gate.count(choices if routing.counted is None else choices[routing.counted])
        return choices


def replayed(own: Tensor, record: Tensor) -> Tensor:
    """[N, K]: the recorded experts, and a token's own where there is no record (-1)."""
    return torch.where((record >= 0).all(dim=-1, keepdim=True), record.to(own), own)


def routers(model: nn.Module) -> list[Router]:
    """The routers of a model, in the order of its layers."""
    return [module for module in model.modules() if isinstance(module, Router)]


def expert_counts(model: nn.Module) -> Tensor:
    """Choices of each expert in training passes since the last `take_loads`: [L, E] int64; [0, 0] if dense."""
    counts = [
        torch.zeros_like(router.expert_load, dtype=torch.int64) if router.expert_counts is None
        else router.expert_counts
        for router in routers(model)
    ]
    return torch.stack(counts) if counts else torch.zeros(0, 0, dtype=torch.int64)


@torch.no_grad()
def take_loads(model: nn.Module, counts: Tensor) -> None:
    """Once an optimizer step: loads for the next step's balance loss, and counts back to zero.

    Args:
        counts: [L, E], `expert_counts` summed over all ranks. A layer that counted nothing keeps its load.
    """
    for router, layer_counts in zip(routers(model), counts, strict=True):
        router.expert_counts = None
        layer_counts = layer_counts.to(router.expert_load.device)
        total = layer_counts.sum()
        router.expert_load.copy_(torch.where(total > 0, layer_counts / total.clamp(min=1), router.expert_load))


@torch.no_grad()
def move_biases(model: nn.Module, counts: Tensor) -> None:
    """Once an optimizer step that trains the model itself: every balancing bias.

    Args:
        counts: as of `take_loads`. A layer that counted nothing keeps its bias.
    """
    for router, layer_counts in zip(routers(model), counts, strict=True):
        bias = router.e_score_correction_bias
        if bias is not None:
            rate = router.config.router_bias_update_rate
            bias.copy_(router_bias_update(bias, layer_counts.to(bias.device), rate=rate))


def router_state(model: nn.Module) -> dict[str, Tensor]:
    """Loads and balancing biases by name: what a checkpoint of adapters or of parameters alone would lose."""
    buffers = dict(model.named_buffers())
    kept = ("expert_load", "e_score_correction_bias")
    return {name: buffer.detach().clone() for name, buffer in buffers.items() if name.rpartition(".")[2] in kept}


@torch.no_grad()
def load_router_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `router_state` gave."""
    buffers = dict(model.named_buffers())
    for name, value in state.items():
        buffers[name].copy_(value)

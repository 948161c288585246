"""Mixture-of-experts feed-forward: a router chooses, and the chosen experts are computed in groups.

Shapes: N tokens, H hidden size, E experts, K experts a token, I intermediate size, L sparse layers, M = N * K rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from alignlab.models.config import PolicyConfig
from alignlab.models.decoder import causal_lm
from alignlab.models.layers import ACTIVATIONS, FeedForward, clamped_swiglu
from alignlab.models.routers.expert_choice import tokens_per_expert
from alignlab.models.routers.make import make_router
from alignlab.models.routers.protocol import NOTHING_KNOWN, Router
from alignlab.models.routing import RoutingRecord


class _Regroup(torch.autograd.Function):
    """rows[order // copies]: rows sorted by expert, or back. The backward gathers too: its sums have a fixed order."""

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


class _RegroupComputed(torch.autograd.Function):
    """`_Regroup` where some rows are dropped: an index of len(rows) stands for a row of zeros, forward and backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return _with_zero_row(rows).index_select(0, order // copies if copies > 1 else order)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        grad = _with_zero_row(grad).index_select(0, inverse)
        return grad.unflatten(0, (-1, ctx.copies)).sum(1) if ctx.copies > 1 else grad, None, None, None


def _with_zero_row(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


class ExpertOrder(NamedTuple):
    """Choices sorted by expert.

    Attributes:
        order: [M*K] the choice at each sorted row.
        inverse: [M*K] the sorted row of each choice.
        ends: [E] int32, where each expert's rows end.
    """

    order: Tensor
    inverse: Tensor
    ends: Tensor

    @property
    def back(self) -> ExpertOrder:
        """The order from sorted rows to choices."""
        return ExpertOrder(self.inverse, self.order, self.ends)


def expert_order(choices: Tensor, num_experts: int) -> ExpertOrder:
    """Return the order of choices [M, K] of which none is dropped."""
    sorted_ids, order = choices.flatten().sort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return ExpertOrder(order, inverse, _ends(sorted_ids, num_experts))


def regroup(rows: Tensor, order: ExpertOrder, copies: int) -> Tensor:
    """Return rows [M, ...] in an order of M * copies, each row `copies` times."""
    moved: Tensor = _Regroup.apply(rows, order.order, order.inverse, copies)
    return moved


def _ends(sorted_ids: Tensor, num_experts: int) -> Tensor:
    """Return where each expert's rows end, [E] int32."""
    experts = torch.arange(num_experts, device=sorted_ids.device)
    return torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)  # bincount would wait for the device


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
    """Gated experts with stacked weights: gate_up_proj [E, 2I, H], down_proj [E, H, I].

    Rows are sorted by expert, and each projection is one grouped product, so the counts never leave the device. Rows of
    dropped choices come last, in no group: what a grouped product writes there is undefined, and never read.
    """

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        assert config.moe_intermediate_size is not None
        self.num_experts = config.num_experts
        self.config = config
        self.activation = ACTIVATIONS[config.hidden_act]
        sizes = (config.num_experts, config.moe_intermediate_size, config.hidden_size)
        self.gate_up_proj = nn.Parameter(torch.empty(sizes[0], 2 * sizes[1], sizes[2]))
        self.down_proj = nn.Parameter(torch.empty(sizes[0], sizes[2], sizes[1]))

    def forward(
        self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, low_rank: Mapping[str, LowRank] | None = None
    ) -> Tensor:
        """Return the weighted sum of each token's experts.

        Args:
            hidden: [N, H].
            topk_ids: [N, K], choices as in `routers.coded`.
            topk_weights: [N, K], 0 where a choice is dropped.
            low_rank: an adapter's terms, by the name of the parameter that they are added to.
        """
        low_rank = low_rank or {}
        copies = topk_ids.shape[1]
        if self.config.drops_choices:
            order, inverse, ends = self._computed_order(topk_ids)
            mover: Any = _RegroupComputed
        else:
            order, inverse, ends = expert_order(topk_ids, self.num_experts)
            mover = _Regroup
        rows = mover.apply(hidden, order, inverse, copies)
        gate, up = self._gate_and_up(rows, ends, low_rank.get("gate_up_proj"))
        rows = self._down(self._activated(gate, up), ends, low_rank.get("down_proj"))
        outputs = mover.apply(rows, inverse, order, 1).unflatten(0, (-1, copies))
        return (outputs * topk_weights.to(outputs.dtype).unsqueeze(-1)).sum(1)

    def _gate_and_up(self, rows: Tensor, ends: Tensor, term: LowRank | None) -> tuple[Tensor, Tensor]:
        """Return the first projections [M, I] of rows [M, H], sorted by expert."""
        gate, up = _grouped(rows, self.gate_up_proj, ends, term).chunk(2, dim=-1)
        return gate, up

    def _down(self, rows: Tensor, ends: Tensor, term: LowRank | None) -> Tensor:
        """Return the last projection [M, H] of rows [M, I], sorted by expert."""
        return _grouped(rows, self.down_proj, ends, term)

    def _activated(self, gate: Tensor, up: Tensor) -> Tensor:
        limit = self.config.swiglu_limit
        if limit is None:
            return self.activation(gate) * up
        return clamped_swiglu(gate, up, limit=limit, alpha=self.config.swiglu_alpha)

    def _computed_order(self, choices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the order of the computed rows, each choice's place in it, and the ends of the experts' rows.

        A dropped choice has the place after the last row.
        """
        flat = choices.flatten()
        sorted_ids, order = torch.where(flat < 0, self.num_experts, flat).sort(stable=True)
        if self.config.router_type == "expert_choice":  # so many rows are computed, and no others
            chosen = self.config.num_experts_per_tok
            room = tokens_per_expert(len(choices), num_experts=self.num_experts, num_chosen=chosen)
            order = order[: self.num_experts * room]
        inverse = torch.full_like(flat, len(order)).scatter_(0, order, torch.arange(len(order), device=order.device))
        return order, torch.where(flat < 0, len(order), inverse), _ends(sorted_ids, self.num_experts)


class BiasedExperts(Experts):
    """Experts with biases, whose matrices lie as gpt-oss has them: transposed, the columns of gate and up in turn.

    Attributes:
        gate_up_proj, down_proj: [E, H, 2I] and [E, I, H].
        gate_up_proj_bias, down_proj_bias: [E, 2I] and [E, H].
    """

    gate_up_proj_bias: nn.Parameter
    down_proj_bias: nn.Parameter

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__(config)
        for name in ("gate_up_proj", "down_proj"):
            count, out, width = self.get_parameter(name).shape
            setattr(self, name, nn.Parameter(torch.empty(count, width, out)))
            setattr(self, f"{name}_bias", nn.Parameter(torch.zeros(count, out)))

    def _gate_and_up(self, rows: Tensor, ends: Tensor, term: LowRank | None) -> tuple[Tensor, Tensor]:
        both = _grouped(rows, self.gate_up_proj.transpose(1, 2), ends, term)
        both = both + _grouped_bias(rows, self.gate_up_proj_bias, ends)
        return both[..., ::2], both[..., 1::2]

    def _down(self, rows: Tensor, ends: Tensor, term: LowRank | None) -> Tensor:
        return _grouped(rows, self.down_proj.transpose(1, 2), ends, term) + _grouped_bias(
            rows, self.down_proj_bias, ends
        )


def _grouped_bias(rows: Tensor, bias: Tensor, ends: Tensor) -> Tensor:
    """Return the bias [E, out] of each row's expert -> [M, out], for rows sorted by expert.

    As a product with ones, whose gradient sums rows in a fixed order; an index's would not on a GPU.
    """
    width = 16 // rows.element_size()  # a grouped product reads rows of 16 bytes
    ones = F.pad(rows.new_ones(len(rows), 1), (0, width - 1))
    return F.grouped_mm(ones, F.pad(bias[:, None], (0, 0, 0, width - 1)), offs=ends)


def _grouped(rows: Tensor, weight: Tensor, ends: Tensor, term: LowRank | None) -> Tensor:
    """Multiply rows [M, in], sorted by expert, by the weight [E, out, in] of each row's expert -> [M, out].

    Args:
        ends: [E] int32, where each expert's rows end.
        term: added to the weight; its two products are computed apart, at rank / out of the cost.
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
    """Routed experts, and shared experts that compute every token; they have the names of Qwen3-Next where gated, and a
    router with a bias has that of gpt-oss.

    Args:
        config: of the model.
        moe_index: place of the layer in a record of choices; None for one that no record holds.

    References: Shazeer et al. (2017), arXiv:1701.06538; fine-grained and shared experts: Dai et al. (2024),
    arXiv:2401.06066.
    """

    def __init__(self, config: PolicyConfig, moe_index: int | None) -> None:
        super().__init__()
        assert config.moe_intermediate_size is not None
        self.moe_index = moe_index
        self._router_name = "router" if config.router_linear_bias else "gate"
        self.add_module(self._router_name, make_router(config))
        self.experts = BiasedExperts(config) if config.expert_bias else Experts(config)
        size, hidden = config.shared_expert_size, config.hidden_size
        self._shared_name = "shared_expert" if config.shared_expert_gate else "shared_experts"
        shared = FeedForward(hidden, size, activation=config.hidden_act) if size else None
        self.add_module(self._shared_name, shared)
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False) if config.shared_expert_gate else None

    @property
    def chooser(self) -> Router:
        """The router."""
        return cast(Router, getattr(self, self._router_name))

    def forward(self, hidden_states: Tensor, routing: RoutingRecord | None = None) -> Tensor:
        """Return the experts' outputs of hidden states [..., H], in their shape.

        Args:
            routing: choices to replay, and where those made are noted.
        """
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        tokens = NOTHING_KNOWN if routing is None else routing.tokens
        router = self.chooser
        scores = router(hidden, tokens)
        if routing is None or self.moe_index is None:
            choices = router.choose(scores, tokens)
        else:
            choices = routing.choose(self.moe_index, router, scores)
        output = self.experts(hidden, choices, router.gates(scores, choices))
        shared = getattr(self, self._shared_name)
        if self.shared_expert_gate is not None:
            output = output + self.shared_expert_gate(hidden).sigmoid() * shared(hidden)
        elif shared is not None:
            output = output + shared(hidden)
        return output.view_as(hidden_states)


def routers(model: nn.Module) -> list[Router]:
    """Return the routers of a model, in the order of a record's layers: of experts, then of heads; none if dense."""
    modules = list(model.modules())
    sparse = [module for module in modules if isinstance(module, SparseFeedForward)]
    of_experts = [module.chooser for module in sparse if module.moe_index is not None]
    return of_experts + [cast(Router, module.gate) for module in modules if getattr(module, "routes", False)]


def expert_counts(model: nn.Module) -> Tensor:
    """Return how often training passes chose each expert since the last `take_loads`: [L, E] int64; [0, 0] if dense.

    Where communication is balanced, D columns more say how many tokens were sent to each group of experts. A router of
    fewer experts has zeros in its last columns.
    """
    counts = [router.counts() for router in routers(model)]
    return pad_sequence(counts, batch_first=True) if counts else torch.zeros(0, 0, dtype=torch.int64)


def of_experts(model: nn.Module, counts: Tensor) -> Tensor:
    """Return the part [L, E] of `expert_counts` that counts experts, or, in a model without, heads."""
    config = causal_lm(model).config
    num_layers = len(config.sparse_layers)
    return counts[:num_layers, : config.num_experts] if num_layers else counts


def forget_counts(model: nn.Module) -> None:
    """Drop what was counted since the last `take_loads`."""
    for router in routers(model):
        router.forget_counts()


def take_loads(model: nn.Module, counts: Tensor) -> None:
    """Set the loads for the next optimizer step's balance loss, and the counts to zero; once a step.

    Args:
        counts: `expert_counts` summed over all ranks. A layer that counted nothing keeps its load.
    """
    for router, layer_counts in zip(routers(model), counts, strict=True):
        size = len(router.counts())
        router.forget_counts()
        router.take_load(layer_counts[:size])


def move_biases(model: nn.Module, counts: Tensor) -> None:
    """Move every balancing bias; once an optimizer step that trains the model itself.

    Args:
        counts: as in `take_loads`. A layer that counted nothing keeps its bias.
    """
    for router, layer_counts in zip(routers(model), counts, strict=True):
        router.move_bias(layer_counts)

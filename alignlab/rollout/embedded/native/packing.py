"""Weights of modules in the order in which the kernels read them.

Letters in shapes: D hidden size, I intermediate size, E experts, P panels of 32 outputs, W words of an input row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alignlab.models.config import PolicyConfig
from alignlab.models.layers import FeedForward, FusedFeedForward, ZeroCenteredRMSNorm
from alignlab.models.moe import SparseFeedForward
from alignlab.rollout.embedded.native.binding import (
    LANES,
    PANEL,
    ExpertsStruct,
    FeedForwardStruct,
    Kernels,
    WeightStruct,
)
from alignlab.rollout.embedded.native.rounded_packing import FORMATS, rounded_panels
from alignlab.rollout.embedded.native.slabs import Slabs
from alignlab.rollout.embedded.rounding import Rounding

ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1, "relu": 2}
"""By `hidden_act`; numbers of `Activation` in source/model.h."""
SCORINGS = {"softmax": 0, "sigmoid": 1, "sqrtsoftplus": 2}
"""By `scoring_func`; numbers of `Scoring` there."""

Plain = Callable[[nn.Module], Any]
"""Returns a module with its adapters merged in."""


class Packer:
    """Packs weights by the kernels of a dtype.

    Args:
        kernels: for the dtype of the weights.
        plain: merges the adapters of a module.
        rounding: of the weights of some modules; None rounds none.

    Attributes:
        num_bytes: of all packed weights so far.
        rounding_s: seconds that rounding took so far.
    """

    def __init__(self, kernels: Kernels, plain: Plain, rounding: Rounding | None = None) -> None:
        self.plain = plain
        self.num_bytes = 0
        self.rounding_s = 0.0
        self._rounding = rounding
        self._kernels = kernels
        self._slabs = Slabs()

    def rounds(self, *modules: nn.Module) -> bool:
        """Return whether the weights of modules, which are packed together, are rounded."""
        return self._rounding is not None and self._rounding.layers.issuperset(modules)

    def stacked(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor | None] = (), *, rounded: bool = False
    ) -> WeightStruct:
        """Return weights [out, in] of one input, one after another, as one; biases [out] likewise."""
        bias = [b.detach().float() for b in biases if b is not None]
        assert len(bias) in (0, len(weights)), "projections of one input have biases all together"
        joined = torch.cat(bias) if bias else None
        outputs = sum(len(weight) for weight in weights)
        if rounded:
            rows = torch.cat([_rows(weight) for weight in weights]) if len(weights) > 1 else _rows(weights[0])
            return self._rounded(F.pad(rows, (0, 0, 0, -outputs % PANEL)), outputs, joined)
        panels = self._panels(-(-outputs // PANEL), weights[0].shape[1])
        first = 0
        for weight in weights:
            self._kernels.pack(_rows(weight), panels, first=first, per_panel=PANEL, lane=0)
            first += len(weight)
        return self._struct(panels, outputs, joined)

    def interleaved(
        self, gate: Tensor, up: Tensor, biases: Sequence[Tensor | None] = (), *, rounded: bool = False
    ) -> WeightStruct:
        """Return gate and up projections [I, in] with 16 outputs of each in a panel; biases [I] likewise."""
        num_panels = -(-len(gate) // LANES)
        bias = None
        if biases and biases[0] is not None:
            bias = torch.zeros(2, num_panels * LANES)
            for row, values in zip(bias, biases, strict=True):
                assert values is not None
                row[: len(values)] = values.detach()
            bias = bias.view(2, -1, LANES).transpose(0, 1).flatten()
        if rounded:
            both = [F.pad(_rows(weight), (0, 0, 0, -len(weight) % LANES)) for weight in (gate, up)]
            halves = torch.stack([weight.unflatten(0, (-1, LANES)) for weight in both], 1)
            return self._rounded(halves.flatten(0, 2), 2 * len(gate), bias)
        panels = self._panels(num_panels, gate.shape[1])
        for lane, weight in ((0, gate), (LANES, up)):
            self._kernels.pack(_rows(weight), panels, first=0, per_panel=LANES, lane=lane)
        return self._struct(panels, 2 * len(gate), bias)

    def feed_forward(self, mlp: nn.Module) -> FeedForwardStruct:
        """Return a gated feed-forward."""
        down = self.plain(mlp.down_proj)  # type: ignore[arg-type]
        packed = FeedForwardStruct()
        if isinstance(mlp, FusedFeedForward):
            rounded = self.rounds(mlp.gate_up_proj)
            both = self.plain(mlp.gate_up_proj)
            gate, up = both.weight.chunk(2)
            biases = (None, None) if both.bias is None else both.bias.chunk(2)
        else:
            assert isinstance(mlp, FeedForward)
            rounded = self.rounds(mlp.gate_proj, mlp.up_proj)
            projections = self.plain(mlp.gate_proj), self.plain(mlp.up_proj)
            gate, up = (projection.weight for projection in projections)
            biases = tuple(projection.bias for projection in projections)
        packed.hold(
            gate_up=self.interleaved(gate, up, biases, rounded=rounded),
            down=self.stacked([down.weight], [down.bias], rounded=self.rounds(mlp.down_proj)),
        )
        return packed

    def mixture(self, sparse: SparseFeedForward, config: PolicyConfig) -> ExpertsStruct:
        """Return routed and shared experts."""
        router, experts = self.plain(sparse.gate), self.plain(sparse.experts)  # type: ignore[arg-type]
        packed, rounded = ExpertsStruct(), self.rounds(sparse.experts)
        each = []
        for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
            expert = FeedForwardStruct()
            expert.hold(
                gate_up=self.interleaved(*gate_up.chunk(2), rounded=rounded), down=self.stacked([down], rounded=rounded)
            )
            each.append(expert)
        array = (FeedForwardStruct * len(each))(*each)
        packed.hold(
            num_experts=config.num_experts, num_chosen=config.num_experts_per_tok,
            router=self.stacked([router.weight]), choice_bias=floats(router.e_score_correction_bias),
            scoring=SCORINGS[config.scoring_func], normalizes=int(config.norm_topk_prob),
            factor=float(config.routed_scaling_factor), exact_logits=int(config.router_in_fp32), experts=array,
        )
        packed.__dict__["held"]["each"] = each  # the array has copies of their addresses
        shared = getattr(sparse, sparse._shared_name)
        if shared is not None:
            packed.hold(shared=self.feed_forward(self.plain(shared)))
        if sparse.shared_expert_gate is not None:
            packed.hold(shared_gate=self.stacked([self.plain(sparse.shared_expert_gate).weight]))
        return packed

    def _rounded(self, rows: Tensor, outputs: int, bias: Tensor | None) -> WeightStruct:
        """Return a rounded weight [P*32,in] with its outputs in the order of the panels."""
        assert self._rounding is not None
        started = time.perf_counter()
        units, scales, shifts = rounded_panels(rows, self._rounding)
        held = []
        for tensor in (units, scales):
            place = self._slabs.zeros(-(-tensor.numel() * tensor.element_size() // torch.int32.itemsize))
            place.view(tensor.dtype)[: tensor.numel()].view(tensor.shape).copy_(tensor)
            self.num_bytes += place.nbytes
            held.append((place, (-1,), torch.int32))
        weight = WeightStruct()
        weight.hold(
            panels=held[0], bias=floats(bias), outputs=outputs, words=self._kernels.words(rows.shape[1]),
            format=FORMATS[self._rounding.settings.type], inputs=rows.shape[1],
            groups=scales.shape[1] if self._rounding.group else 0, scales=held[1],
            shifts=(shifts, (-1, PANEL), torch.int32),
        )  # fmt: skip
        self.rounding_s += time.perf_counter() - started
        return weight

    def _panels(self, count: int, size: int) -> Tensor:
        """Return P panels for rows of a size, [P, W, 32] int32 zeros."""
        panels = self._slabs.zeros(count, self._kernels.words(size), PANEL)
        self.num_bytes += panels.nbytes
        return panels

    @staticmethod
    def _struct(panels: Tensor, outputs: int, bias: Tensor | None) -> WeightStruct:
        weight = WeightStruct()
        weight.hold(
            panels=(panels, (-1, -1, PANEL), torch.int32), bias=floats(bias), outputs=outputs, words=panels.shape[1]
        )
        return weight


def _rows(weight: Tensor) -> Tensor:
    return weight.detach().contiguous()


def floats(values: Tensor | None) -> tuple[Tensor, tuple[int], torch.dtype] | None:
    """Return numbers [n] in float32 as a field that a structure holds; None for none."""
    if values is None:
        return None
    values = values.detach().float().contiguous()
    return values, (len(values),), torch.float32


def norm_scale(norm: nn.Module | None) -> tuple[Tensor, tuple[int], torch.dtype] | None:
    """Return what an RMS norm multiplies by, as a field; None without a norm."""
    if norm is None:
        return None
    weight = norm.get_parameter("weight").detach().float()
    return floats(1.0 + weight if isinstance(norm, ZeroCenteredRMSNorm) else weight)

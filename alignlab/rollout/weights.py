"""The weights that the engine runs on: the policy's own, merged copies of adapted layers, or packed copies.

While the engine runs, other linear layers stand in the places of those that have a copy. On a CPU in bfloat16 a copy is
packed, in the order in which the processor's matrix products read it: the same results to the bit, 1.1 to 1.4 times as
fast for up to 64 rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from alignlab.errors import RolloutError
from alignlab.models.adapters import has_adapters
from alignlab.models.attention import causal_lm, output_head
from alignlab.models.merging import check_mergeable, merged_module, wrappers
from alignlab.models.transformer import PolicyForCausalLM

_PACKED_ROWS = 64  # a hint; packings for 1 to 512 rows were equally fast at all sizes


class PackedLinear(nn.Module):
    """A frozen linear layer with its weight in oneDNN's own order."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _PACKED_ROWS)
        self._bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")


def weights_stamp(parameters: Iterable[Tensor], modules: Iterable[nn.Module]) -> tuple[int, ...]:
    """Differs once a parameter was written to or an adapter switched on or off."""
    switched = sum(module.disable_adapters for module in modules if isinstance(module, BaseTunerLayer))
    return (*(parameter._version for parameter in parameters), switched)


def changed_weights(policy_version: int) -> RolloutError:
    """The refusal to generate from weights that are not the policy's any more."""
    return RolloutError(
        f"the policy's weights were changed since version {policy_version}, and what the engine cached or took over is "
        "of the old ones; call update_weights with a new version before generating"
    )


class EngineWeights:
    """Puts copies of linear layers in their places while the engine runs, and puts the policy's own back.

    Args:
        model: the policy.
        merge: give adapted layers copies with the adapter merged in; otherwise adapters run as they are.
        pack: pack copies where that helps, and make them for layers without an adapter too.
    """

    def __init__(self, model: nn.Module, *, merge: bool, pack: bool) -> None:
        self._model = model
        self._merge = merge and has_adapters(model)
        if self._merge:
            check_mergeable(model)
        self._pack = pack and (self._merge or not has_adapters(model)) and _packing_helps(model)
        self._stand_ins: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []  # parent, name, own layer, stand-in
        self._packed_head: PackedLinear | None = None
        self._modules = list(model.modules())  # walking them takes longer than a token does
        self._known = set(self._modules)
        self._parameters = list(model.parameters())
        self._stamp: tuple[int, ...] = ()
        self.refresh()

    def refresh(self) -> None:
        """Take the policy's present weights."""
        self._stand_ins, self._packed_head = [], None  # their memory goes before other copies are made
        self._stamp = self._present()
        head = causal_lm(self._model).get_output_embeddings()
        adapted = set(wrappers(self._model).values())
        for parent, name, layer in self._places(adapted, head):
            stand_in = merged_module(layer) if layer in adapted else layer
            if stand_in not in self._known:
                stand_in.training = False
            if self._pack and layer is not head and type(stand_in) is nn.Linear:
                stand_in = PackedLinear(stand_in.weight, stand_in.bias)
            self._stand_ins.append((parent, name, layer, stand_in))
        if self._pack:
            with self.in_use():
                weight, bias, _ = output_head(self._model)
            self._packed_head = PackedLinear(weight, bias)

    @property
    def is_stale(self) -> bool:
        """Whether the policy's weights were written to, or its adapters switched, since `refresh`."""
        return self._present() != self._stamp

    def _present(self) -> tuple[int, ...]:
        return weights_stamp(self._parameters, self._modules)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within this context the model runs on these weights, in evaluation mode."""
        trained = [module for module in self._modules if module.training]
        try:
            for module in trained:
                module.training = False
            for parent, name, _, stand_in in self._stand_ins:
                parent._modules[name] = stand_in
            yield
        finally:
            for parent, name, layer, _ in self._stand_ins:
                parent._modules[name] = layer
            for module in trained:
                module.training = True

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, hidden size] of the decoder -> [B,V]; to be called in `in_use`."""
        weight, bias, softcap = output_head(self._model)
        logits = linear(hidden, weight, bias) if self._packed_head is None else self._packed_head(hidden)
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def _places(self, adapted: set[nn.Module], head: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
        """(parent, name of the child, layer) of every layer that is to have a stand-in."""
        inside = {module for layer in adapted for module in layer.modules()}
        wanted = set(adapted) if self._merge else set()
        if self._pack:
            wanted |= {module for module in self._modules if type(module) is nn.Linear} - inside - {head}
        for parent in self._modules:
            yield from ((parent, name, child) for name, child in parent.named_children() if child in wanted)


def _packing_helps(model: nn.Module) -> bool:
    """Known to: bfloat16 on a CPU that multiplies it, in our own models, which call their linear layers."""
    lm = causal_lm(model)
    weight = output_head(model)[0]
    if not isinstance(lm, PolicyForCausalLM) or weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())

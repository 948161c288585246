"""Merging of adapters: plain modules and weights that compute the same, for engines and checkpoints.

A merged weight is summed in float32 and rounded once to the base's dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignlab.errors import ConfigError
from alignlab.models.adapter_rules import check_layer, tuner_layers
from alignlab.models.decoder import causal_lm, lm_path
from alignlab.models.weight_view import WeightsInside, WeightView, view_of, whole_module


def check_mergeable(model: nn.Module) -> None:
    """Raise if an adapter cannot be merged into weights of the base's names and shapes.

    Raises:
        ConfigError: with the layer, and what to change.
    """
    for name, layer in tuner_layers(model):
        if isinstance(layer, LoraLayer):
            check_layer(name, layer)


def wrappers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost layers that PEFT put around the language model's modules, by the names of those modules."""
    outermost: dict[str, nn.Module] = {}
    outer = None
    for name, module in causal_lm(model).named_modules():  # a module comes before those inside it
        if outer is not None and name.startswith(f"{outer}."):
            continue
        if _is_wrapper(module):
            outermost[name], outer = module, name
    return outermost


@torch.no_grad()
def merged_module(wrapper: nn.Module) -> nn.Module:
    """Return a module without adapters that computes the same as a wrapped one; unadapted tensors are shared."""
    if isinstance(wrapper, ModulesToSaveWrapper):
        active = wrapper.active_adapters
        off = wrapper.disable_adapters or not active
        return cast(nn.Module, wrapper.original_module if off else wrapper.modules_to_save[active[0]])
    layer: Any = wrapper.token_adapter if isinstance(wrapper, TrainableTokensWrapper) else wrapper
    base = layer.get_base_layer()
    if layer.disable_adapters:
        return cast(nn.Module, base)
    if isinstance(wrapper, TrainableTokensWrapper):
        return _with_parameters(base, {"weight": layer.get_merged_weights(layer.active_adapters)})
    merged: dict[str, Tensor] = {}
    while isinstance(layer, LoraLayer):  # adapters of several parameters of one module are nested
        for adapter in layer.active_adapters:
            _merge(layer, adapter, base, merged)
        layer = layer.base_layer if isinstance(layer, ParamWrapper) else None
    return _with_parameters(base, merged)


def weight_with_adapters(layer: nn.Module) -> Tensor:
    """Return the weight [out, in] by which a linear layer multiplies, any adapters on it merged in; not for gradients.
    """
    plain = merged_module(layer) if _is_wrapper(layer) else layer
    return plain.get_parameter("weight").detach()


def base_module(wrapper: nn.Module) -> nn.Module:
    """Return the module that the adapters were put on."""
    if isinstance(wrapper, AuxiliaryTrainingWrapper):
        return cast(nn.Module, wrapper.original_module)
    return cast(nn.Module, cast(Any, wrapper).get_base_layer())


def merged_state(model: nn.Module, weights: WeightView | None = None) -> dict[str, Tensor]:
    """Return the language model's state with all adapters merged, under the names that it has without them.

    Args:
        weights: view of `model`; default: `view_of` it.

    Raises:
        ConfigError: see `check_mergeable`.
    """
    return dict(pair for part in merged_parts(model, weights) for pair in part.items())


def merged_parts(model: nn.Module, weights: WeightView | None = None) -> Iterator[dict[str, Tensor]]:
    """Yield `merged_state` in parts, of which no earlier one is held: each decoder layer, and each module outside them.

    Args:
        weights: view of `model`; default: `view_of` it.

    Raises:
        ConfigError: see `check_mergeable`.
    """
    check_mergeable(model)
    yield from _plain_parts(model, merged_module, weights)


def base_state(model: nn.Module, weights: WeightView | None = None) -> dict[str, Tensor]:
    """Return the language model's state without its adapters.

    Args:
        weights: view of `model`; default: `view_of` it.
    """
    return dict(pair for part in base_parts(model, weights) for pair in part.items())


def base_parts(model: nn.Module, weights: WeightView | None = None) -> Iterator[dict[str, Tensor]]:
    """Yield `base_state` in the parts of `merged_parts`."""
    yield from _plain_parts(model, base_module, weights)


def unties(model: nn.Module) -> bool:
    """True if an adapter on the embeddings or on the head lets the two differ, though the config ties them."""
    lm = causal_lm(model)
    if not lm.config.get_text_config().tie_word_embeddings:
        return False
    head = lm.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper) and head.token_adapter.tied_adapter is not None:
        return False
    return any(_is_wrapper(module) for module in (lm.get_input_embeddings(), head))


def _is_wrapper(module: object) -> bool:
    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def untie_config(config: Any) -> None:
    """Set a config to untied embeddings and head."""
    for tied in (config, config.get_text_config()):
        tied.tie_word_embeddings = False
    if getattr(config, "hub_config", None):  # one of ours: the config that is written to the checkpoint
        config.hub_config = {**config.hub_config, "tie_word_embeddings": False}


def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """Merge a model's adapters into it, and return it without them; tied embeddings are untied if they differ.

    Raises:
        ConfigError: the adapter is of a form that cannot be merged.
    """
    lm = causal_lm(model)
    if unties(model):
        head = lm.get_output_embeddings()
        plain: Any = base_module(head) if _is_wrapper(head) else head
        # PEFT merges in place: a head that shares its weight with the embeddings would change with them.
        plain.weight = nn.Parameter(plain.weight.detach().clone(), requires_grad=False)
        untie_config(lm.config)
    try:
        return cast(PreTrainedModel, model.merge_and_unload(safe_merge=True))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"the adapter cannot be merged into its base: {error}; use the adapter as it is") from error


def _plain_parts(
    model: nn.Module, plain: Callable[[nn.Module], nn.Module], weights: WeightView | None
) -> Iterator[dict[str, Tensor]]:
    inner = WeightsInside(weights or view_of(model), lm_path(model))
    wrapped = wrappers(model)
    layers = layer_names(model)
    parts: dict[str, list[str]] = {}
    for name in inner.names():
        unit = next((wrapper for wrapper in wrapped if name.startswith(f"{wrapper}.")), name)
        units = parts.setdefault(next((layer for layer in layers if name.startswith(f"{layer}.")), unit), [])
        if unit not in units:
            units.append(unit)
    for units in parts.values():
        yield dict(pair for unit in units for pair in _plain_tensors(inner, unit, wrapped.get(unit), plain))


def _plain_tensors(
    weights: WeightView, name: str, wrapper: nn.Module | None, plain: Callable[[nn.Module], nn.Module]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a wrapped module without its wrapper, or the one tensor of that name."""
    if wrapper is None:
        yield name, weights.whole(name)
        return
    whole = whole_module(wrapper, WeightsInside(weights, name))
    for key, tensor in plain(whole).state_dict().items():
        yield f"{name}.{key}", tensor


def layer_names(model: nn.Module) -> list[str]:
    """Return the names of the language model's decoder layers."""
    lm = causal_lm(model)
    lists = [module for module in lm.get_decoder().children() if isinstance(module, nn.ModuleList)]
    layers = {id(layer) for layer_list in lists for layer in layer_list}
    return [name for name, module in lm.named_modules() if id(module) in layers]


def _merge(layer: LoraLayer, adapter: str, base: nn.Module, merged: dict[str, Tensor]) -> None:
    """Add one adapter of a layer to the base's parameters in `merged`, in float32."""
    if adapter not in layer.lora_A and adapter not in layer.lora_embedding_A:
        return
    name = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    merged[name] = _merged_weight(layer, adapter, base.get_parameter(name), merged.get(name))
    if layer.lora_bias.get(adapter):
        bias = merged.get("bias", base.get_parameter("bias").float())
        merged["bias"] = bias + layer.scaling[adapter] * layer.lora_B[adapter].get_parameter("bias").float()


def _merged_weight(layer: LoraLayer, adapter: str, weight: Tensor, sum_so_far: Tensor | None) -> Tensor:
    """Return the weight, or the sum so far, with one adapter added."""
    if adapter in layer.lora_variant:
        return layer.lora_variant[adapter].merge_safe(layer, adapter, weight.data)
    total = weight.float() if sum_so_far is None else sum_so_far
    if isinstance(layer, LoraLinear) and not layer.fan_in_fan_out:
        up, down = (matrices[adapter].get_parameter("weight").float() for matrices in (layer.lora_B, layer.lora_A))
        return total.addmm(up, down, alpha=layer.scaling[adapter])
    return total + cast(Any, layer).get_delta_weight(adapter).float()


def _with_parameters(base: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Return a shallow copy of a module with some of its parameters replaced, frozen and rounded to their dtypes."""
    module = copy.copy(base)
    module._parameters = dict(base._parameters)
    for name, tensor in tensors.items():
        dtype = base.get_parameter(name).dtype
        module._parameters[name] = nn.Parameter(tensor.detach().to(dtype), requires_grad=False)
    return module

"""Plain modules and weights that compute what a model computes with its adapters: for engines and checkpoints.

A merged weight is summed in float32 and rounded once to the base's dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
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
from alignlab.models.attention import causal_lm


def check_mergeable(model: nn.Module) -> None:
    """Raise if an adapter cannot be merged into weights of the base's names and shapes.

    Raises:
        ConfigError: with the layer, and what to change.
    """
    for name, layer in tuner_layers(model):
        if isinstance(layer, LoraLayer):
            check_layer(name, layer)


def wrappers(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost layers that PEFT put around the language model's modules, by the names of those modules."""
    found: dict[str, nn.Module] = {}
    outer = None
    for name, module in causal_lm(model).named_modules():  # a module comes before those inside it
        if outer is not None and name.startswith(f"{outer}."):
            continue
        if _is_wrapper(module):
            found[name], outer = module, name
    return found


@torch.no_grad()
def merged_module(wrapper: nn.Module) -> nn.Module:
    """A module without adapters that computes what a wrapped one does now; it shares whatever was not merged."""
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
    while isinstance(layer, LoraLayer):  # the adapters of several parameters of one module are nested
        for adapter in layer.active_adapters:
            _merge(layer, adapter, base, merged)
        layer = layer.base_layer if isinstance(layer, ParamWrapper) else None
    return _with_parameters(base, merged)


def base_module(wrapper: nn.Module) -> nn.Module:
    """The module that the adapters were put on."""
    if isinstance(wrapper, AuxiliaryTrainingWrapper):
        return cast(nn.Module, wrapper.original_module)
    return cast(nn.Module, cast(Any, wrapper).get_base_layer())


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The language model's state with all adapters merged, under the names that it has without them.

    Raises:
        ConfigError: see `check_mergeable`.
    """
    check_mergeable(model)
    return _plain_state(model, merged_module)


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The language model's state without its adapters."""
    return _plain_state(model, base_module)


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
    """Write into a config that embeddings and head are two tensors."""
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
    if getattr(config, "hub_config", None):  # of one of ours: the config that it is written back as
        config.hub_config = {**config.hub_config, "tie_word_embeddings": False}


def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """The model with its adapters merged in, which are gone afterwards; tied embeddings are untied where they differ.

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


def _plain_state(model: nn.Module, plain: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
    state = dict(causal_lm(model).state_dict())
    for name, wrapper in wrappers(model).items():
        for key in [key for key in state if key.startswith(f"{name}.")]:
            del state[key]
        state |= {f"{name}.{key}": tensor for key, tensor in plain(wrapper).state_dict().items()}
    return state


def _merge(layer: LoraLayer, adapter: str, base: nn.Module, merged: dict[str, Tensor]) -> None:
    """Add one adapter of a layer to the base's parameters in `merged`, in float32."""
    if adapter not in layer.lora_A and adapter not in layer.lora_embedding_A:
        return
    name = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    weight = merged.get(name)
    weight = base.get_parameter(name).float() if weight is None else weight
    if adapter in layer.lora_variant:
        merged[name] = layer.lora_variant[adapter].merge_safe(layer, adapter, base.get_parameter(name).data)
    elif isinstance(layer, LoraLinear) and not layer.fan_in_fan_out:
        up, down = (matrices[adapter].get_parameter("weight").float() for matrices in (layer.lora_B, layer.lora_A))
        merged[name] = weight.addmm(up, down, alpha=layer.scaling[adapter])
    else:
        merged[name] = weight + cast(Any, layer).get_delta_weight(adapter).float()
    if layer.lora_bias.get(adapter):
        bias = merged.get("bias")
        bias = base.get_parameter("bias").float() if bias is None else bias
        merged["bias"] = bias + layer.scaling[adapter] * layer.lora_B[adapter].get_parameter("bias").float()


def _with_parameters(base: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """A shallow copy of a module with some of its parameters replaced, frozen and rounded to their dtypes."""
    module = copy.copy(base)
    module._parameters = dict(base._parameters)
    for name, tensor in tensors.items():
        dtype = base.get_parameter(name).dtype
        module._parameters[name] = nn.Parameter(tensor.detach().to(dtype), requires_grad=False)
    return module

"""A student made of some of a teacher's layers: the same widths, embeddings, norms and head, and fewer parameters.

Sanh et al. (2019), DistilBERT, arXiv:1910.01108, Sec. 3, begin so, with every other layer. A pruned model writes little
that makes sense until distillation has trained it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from accelerate import init_empty_weights
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from alignlab.errors import ConfigError
from alignlab.models.attention_rules import drop_unread_fields
from alignlab.models.config import PolicyConfig
from alignlab.models.hub.families import FAMILIES
from alignlab.models.layer_sharing import refuse_sharing
from alignlab.models.router_rules import OF_SPARSE_LAYERS
from alignlab.models.weight_view import view_of, whole_tensors

_NUMBERS_OF_LAYERS = ("mlp_only_layers",)


def evenly_spaced(num_layers: int, count: int) -> tuple[int, ...]:
    """Return `count` of `num_layers` layers at about equal distances, with the first and the last.

    Args:
        count: from 1 to `num_layers`; 1 is the first layer alone.
    """
    if count == 1:
        return (0,)
    gaps = count - 1
    return tuple((2 * i * (num_layers - 1) + gaps) // (2 * gaps) for i in range(count))


def chosen_layers(
    teacher: PreTrainedModel | PeftModel, layers: Sequence[int] | None, num_layers: int | None
) -> tuple[int, ...]:
    """Return the layers that a student is made of.

    Args:
        layers: indices of the layers; None for evenly spaced ones.
        num_layers: their number, where `layers` is None.

    Raises:
        ConfigError: `num_layers` is more than the teacher has.
    """
    num_teacher_layers = teacher.config.get_text_config().num_hidden_layers
    if layers is not None:
        return tuple(layers)
    assert num_layers is not None
    if not 1 <= num_layers <= num_teacher_layers:
        raise ConfigError(
            f"num_layers is {num_layers}, and must be from 1 to the teacher's {num_teacher_layers} layers; lower it"
        )
    return evenly_spaced(num_teacher_layers, num_layers)


def student_from(teacher: PreTrainedModel | PeftModel, layers: Sequence[int]) -> PreTrainedModel:
    """Return a model of the teacher's class and dtype with copies of its chosen layers, in evaluation mode.

    With all layers it computes what the teacher computes. Settings of single layers in the config (kind of attention,
    dense or sparse) go with the layer. A mixture's student without a sparse layer is a dense model.

    Args:
        teacher: ours, or one of `transformers`' whose layers are one list.
        layers: indices of the teacher's layers, ascending, at least one.

    Raises:
        ConfigError: there are no such layers, the teacher's list of layers is not found, its layers share weights, or
            the teacher has an adapter.
    """
    if isinstance(teacher, PeftModel):
        raise ConfigError("the teacher is an adapter on a model, and layers are a model's; merge it: alignlab merge")
    refuse_sharing(teacher.config, what="a student is made of single layers")
    prefix, count = list_of_layers(teacher)
    _check(layers, count)
    config = copy.deepcopy(teacher.config)
    if isinstance(config, PolicyConfig):
        _keep_own_layers(config, layers)
    else:
        _keep_layers(config.get_text_config(), layers)
    config.name_or_path = ""  # the student is in no checkpoint yet
    with no_init_weights(), init_empty_weights(include_buffers=False):
        student: Any = type(teacher)._from_config(config, dtype=teacher.dtype)
    try:
        student.load_state_dict(_weights(teacher, prefix, layers), assign=True)
    except RuntimeError as error:
        raise ConfigError(
            f"the chosen layers of {type(teacher).__name__} do not make a model of its config, which says more of its "
            f"layers than their number: {error}; choose layers that keep its pattern"
        ) from error
    student.tie_weights()
    student.generation_config = copy.deepcopy(teacher.generation_config)
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    model: PreTrainedModel = student.to(teacher.device).eval()
    return model


def list_of_layers(model: PreTrainedModel) -> tuple[str, int]:
    """Return the prefix of the layers' names, and the number of layers."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(layer) for layer in module}) == 1
    ]
    outermost = [name for name in lists if not any(name.startswith(f"{outer}.") for outer in lists)]
    if len(outermost) != 1:
        raise ConfigError(
            f"a student is made of a teacher's layers, and {type(model).__name__} has {len(outermost)} lists of "
            f"{count} layers where one is needed; use a model of {', '.join(sorted(FAMILIES))}, or of a like shape"
        )
    return outermost[0], count


def _check(layers: Sequence[int], count: int) -> None:
    if not layers:
        raise ConfigError("layers is empty, and a student needs at least one of its teacher's; name one")
    wrong = [index for index in layers if not 0 <= index < count]
    if wrong:
        raise ConfigError(f"layers holds {wrong[0]}, and must hold numbers from 0 to {count - 1}, the teacher's layers")
    if list(layers) != sorted(set(layers)):
        raise ConfigError(f"layers is {list(layers)}, and must ascend; use {sorted(set(layers))}")


def _keep_own_layers(config: PolicyConfig, layers: Sequence[int]) -> None:
    """Cut one of our configs, and the Hub's config in it, to the layers."""
    _keep_layers(config, layers)
    drop_unread_fields(config)
    if config.num_experts and not config.sparse_layers:
        config.num_experts = config.n_shared_experts = 0
        for name in OF_SPARSE_LAYERS:
            setattr(config, name, getattr(type(config), name))
        config.hub_config = None  # the student is of a dense family
    if config.hub_config is not None:
        fields = FAMILIES[config.hub_config["model_type"]].to_hub(config)
        config.hub_config = {**config.hub_config, "num_hidden_layers": len(layers), **fields}


def _keep_layers(config: PreTrainedConfig, layers: Sequence[int]) -> None:
    """Cut a config to the layers: their number, each list with an entry a layer, and each list of layers."""
    count = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if name in _NUMBERS_OF_LAYERS and value:
            setattr(config, name, [layers.index(index) for index in value if index in layers])
        elif "layer" in name and isinstance(value, list) and len(value) == count:
            setattr(config, name, [value[index] for index in layers])
    config.num_hidden_layers = len(layers)


def _weights(teacher: PreTrainedModel, prefix: str, layers: Sequence[int]) -> dict[str, Tensor]:
    """Return copies of the teacher's tensors under the student's names."""
    numbers = {str(index): str(number) for number, index in enumerate(layers)}
    weights = {}
    for name, tensor in whole_tensors(view_of(teacher)):
        if not name.startswith(f"{prefix}."):
            weights[name] = tensor.detach().clone()
            continue
        index, _, suffix = name.removeprefix(f"{prefix}.").partition(".")
        if index in numbers:
            weights[f"{prefix}.{numbers[index]}.{suffix}"] = tensor.detach().clone()
    return weights

"""LoRA adapters of PEFT's: putting them on a model, and the roles that several of them have on one frozen base.

Policy, critic and reward model may be adapters on one base, which with all adapters off is the reference.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignlab.config.model import LoraSettings
from alignlab.errors import CheckpointError, ConfigError
from alignlab.models.adapter_rules import (
    ALL_LINEAR,
    check_base_is_reference,
    check_lora_config,
    check_targets,
    check_trainable,
)
from alignlab.models.expert_adapters import GroupedExperts, expert_targets, share_of_experts
from alignlab.models.lora_layers import ComputeDtypeLinear
from alignlab.models.weight_view import WeightView, view_of, whole_tensors

_log = logging.getLogger(__name__)
_NEEDLESS_WARNINGS = (
    "fan_in_fan_out is set to",  # PEFT sets it right
    "`lora_bias=True` was passed",  # refused by `check_trainable`
    r"(?s).*tie_word_embeddings",  # merging here unties them
)


def add_lora(model: PreTrainedModel, lora: LoraSettings | LoraConfig) -> PeftModel:
    """Put a fresh LoRA adapter on a model, whose own weights are frozen.

    Args:
        model: any causal language model.
        lora: our settings, or PEFT's own for the other forms of LoRA that PEFT has.

    Returns:
        PEFT's model; the adapter's weights are float32, its products are computed in the model's dtype.

    Raises:
        ConfigError: a target is not in the model, or the adapter is of a form that cannot be trained, merged and saved
            exactly.
    """
    config = _lora_config(model, lora) if isinstance(lora, LoraSettings) else lora
    check_lora_config(config)
    check_targets(model, config.target_modules, config.target_parameters or [])
    adapts_all, share = config.target_modules == ALL_LINEAR, share_of_experts(model)
    try:
        with warnings.catch_warnings():
            for message in _NEEDLESS_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            adapted = get_peft_model(model, config)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(f"PEFT cannot put this adapter on {type(model).__name__}: {error}") from error
    check_trainable(adapted)
    if adapts_all and share and not any(isinstance(module, ParamWrapper) for module in adapted.modules()):
        _log.warning(
            "target_modules is all-linear, and the experts of this mixture, %.0f %% of its weights, are stacked "
            "parameters (%s) and no linear layers: the adapter leaves them as they are; set lora.experts to true "
            "(PEFT: target_parameters) to adapt them too",
            100 * share, ", ".join(expert_targets(model)),
        )
    return compute_in_base_dtype(adapted)


def _lora_config(model: PreTrainedModel, lora: LoraSettings) -> LoraConfig:
    """Return PEFT's config for our settings."""
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    if isinstance(targets, str) and targets != ALL_LINEAR and targets.isidentifier():
        targets = [targets]  # PEFT would match a string with whole names
    parameters = expert_targets(model) if lora.experts else None
    if lora.experts and not parameters:
        raise ConfigError(
            f"lora.experts is true, and {type(model).__name__} has no stacked experts; leave it out"
        )
    return LoraConfig(
        task_type="CAUSAL_LM", target_modules=targets, target_parameters=parameters, r=lora.rank,
        lora_dropout=lora.dropout,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # annotated int, but fractions work
    )


def compute_in_base_dtype(model: PeftModel) -> PeftModel:
    """Let the LoRA layers of any PeftModel compute in the base's dtype, and return the model."""
    for module in model.modules():
        if type(module) is LoraLinear:
            module.__class__ = ComputeDtypeLinear
        elif type(module) is ParamWrapper:
            module.__class__ = GroupedExperts
    return model


def has_adapters(model: nn.Module) -> bool:
    """Return True if adapters are wrapped around the model."""
    return isinstance(model, PeftModel)


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Make the model its frozen base, which is the reference policy, within this context.

    Raises:
        ConfigError: the adapter was made by changing the base.
    """
    assert isinstance(model, PeftModel), "only a model with adapters has a base to go back to"
    check_base_is_reference(model)
    with _same_weights_in_training(model), model.disable_adapter():
        yield


@contextmanager
def _same_weights_in_training(model: nn.Module) -> Iterator[None]:
    """Restore, at the end of this context, which weights are in training; PEFT changes this with every switch."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, is_trained in flags:
            parameter.requires_grad = is_trained


def add_role(model: PeftModel, name: str, *, rank: int, alpha: float) -> None:
    """Put another LoRA adapter on the layers that the active one is on; that one stays active."""
    config: Any = copy.deepcopy(model.peft_config[model.active_adapter])
    config.r, config.lora_alpha, config.lora_dropout = rank, alpha, 0.0
    config.rank_pattern, config.alpha_pattern = {}, {}
    config.init_lora_weights, config.bias = True, "none"  # other values change the base
    config.modules_to_save = config.trainable_token_indices = None  # the role trains no copies of whole modules
    _put_role(model, name, config)


def load_role(model: PeftModel, name: str, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
    """Put a saved adapter on the same frozen base as another role; the active adapter stays active.

    Raises:
        CheckpointError: the tensors are not those of this adapter on this model.
        ConfigError: the active adapter was made by changing the base.
    """
    check_base_is_reference(model)
    _put_role(model, name, config)
    fill_adapter(model, name, tensors)


def fill_adapter(model: PeftModel, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Give an adapter the tensors of its checkpoint, by PEFT's names.

    Raises:
        CheckpointError: a tensor is missing, superfluous, or of another shape.
    """
    fix = "give the base that it belongs on"
    try:
        result: Any = set_peft_model_state_dict(model, dict(tensors), adapter_name=name)
    except RuntimeError as error:
        raise CheckpointError(f"the adapter does not fit the model: {error}; {fix}") from error
    missing = [key for key in result.missing_keys if _is_of(key, name)]
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"the adapter does not fit the model: missing {missing[:3]}, unexpected {result.unexpected_keys[:3]}; {fix}"
        )


def _put_role(model: PeftModel, name: str, config: PeftConfig) -> None:
    with _same_weights_in_training(model):
        model.add_adapter(name, config)
        compute_in_base_dtype(model)
    for parameter_name, parameter in model.named_parameters():
        if _is_of(parameter_name, name):
            parameter.requires_grad = False


@contextmanager
def in_role(model: PeftModel, name: str) -> Iterator[None]:
    """Make the adapter `name` the active one, and the only part of the model in training, within this context."""
    before = model.active_adapter
    with _same_weights_in_training(model):
        try:
            model.set_adapter(name)
            for parameter_name, parameter in model.named_parameters():
                parameter.requires_grad = _is_of(parameter_name, name)
            yield
        finally:
            model.set_adapter(before)


def is_of_adapter(model: nn.Module, parameter: str) -> bool:
    """Return True if the parameter of that name belongs to any adapter, and not to the base."""
    return isinstance(model, PeftModel) and any(_is_of(parameter, name) for name in model.peft_config)


def adapter_state(model: PeftModel, weights: WeightView | None = None) -> dict[str, Tensor]:
    """Return the whole tensors that PEFT saves adapters from, by their names in the model.

    Args:
        weights: view of `model`; default: `view_of` it.
    """
    weights = weights or view_of(model)
    return dict(whole_tensors(weights, adapter_state_names(model, weights)))


def adapter_state_names(model: PeftModel, weights: WeightView) -> tuple[str, ...]:
    """Return the names of the tensors of `adapter_state`.

    Args:
        weights: view of `model`.
    """
    # With PEFT's `bias="all"` or `"lora_only"`, biases of the base are trained and saved too.
    return tuple(name for name in weights.names() if is_of_adapter(model, name) or name.endswith(".bias"))


def _is_of(parameter: str, adapter: str) -> bool:
    """Return True if the parameter belongs to the adapter, whose name then stands in or at the end of its own."""
    return f".{adapter}." in f"{parameter}."

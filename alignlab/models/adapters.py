"""LoRA adapters, PEFT's own, computed in the base model's dtype.

PEFT keeps the adapter's weights in float32, as an optimizer's small updates need, and then multiplies in float32 too,
which is several times slower than bfloat16. `ComputeDtypeLinear` casts the two small matrices instead, in one function
that saves only the layer's input and the rank-sized product.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from alignlab.config.model import LoraSettings
from alignlab.errors import CheckpointError, ConfigError
from alignlab.models.adapter_rules import check_base_is_reference, check_lora_config, check_trainable
from alignlab.models.config import PolicyConfig
from alignlab.models.expert_adapters import GroupedExperts, expert_targets, share_of_experts, stacked_experts

_log = logging.getLogger(__name__)
_ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d)
_ALL = "all-linear"
_SETTLED = (
    "fan_in_fan_out is set to",  # PEFT sets it right
    "`lora_bias=True` was passed",  # refused below
    r"(?s).*tie_word_embeddings",  # merging here unties them
)
_FORMER_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


class _LoraProduct(torch.autograd.Function):
    """y = x W^T + bias + scale * (x A^T) B^T, products in the dtype of W; W and its bias are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        """x [..., in], weight [out, in], bias [out], down [rank, in], up [out, rank] -> [..., out]."""
        rows = x.reshape(-1, x.shape[-1])
        low_down, low_up = down.to(weight.dtype), up.to(weight.dtype)
        inner = rows @ low_down.T
        y = linear(rows, weight, bias).addmm_(inner, low_up.T, alpha=scale)
        ctx.save_for_backward(rows, inner, weight, down, up)
        ctx.scale = scale
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, down and up; the last two in float32, as the adapter's weights."""
        rows, inner, weight, down, up = ctx.saved_tensors
        grad_rows = grad.reshape(-1, grad.shape[-1])
        grad_inner = (grad_rows @ up.to(weight.dtype)).mul_(ctx.scale)
        grad_down = (grad_inner.T @ rows).to(down.dtype)
        grad_up = (grad_rows.T @ inner).to(up.dtype).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_rows @ weight).addmm_(grad_inner, down.to(weight.dtype)).view(*grad.shape[:-1], -1)
        return grad_x, None, None, grad_down, grad_up, None


class ComputeDtypeLinear(LoraLinear):
    """PEFT's LoRA layer around a frozen `nn.Linear`; whatever is not plain LoRA goes PEFT's way."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] -> [..., out]."""
        name = self._plain_adapter(x)
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base, down, up = self.get_base_layer(), self.lora_A[name].weight, self.lora_B[name].weight
        return _LoraProduct.apply(x, base.weight, base.bias, down, up, self.scaling[name])

    def _plain_adapter(self, x: Tensor) -> str | None:
        """The one active adapter, if it is plain LoRA on a frozen layer of the input's dtype."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(names) != 1 or not _is_plain(self):
            return None
        if torch.is_autocast_enabled(x.device.type):  # casts as it likes; PEFT's products follow it
            return None
        dropped = self.training and not isinstance(self.lora_dropout[names[0]], nn.Identity)
        return None if dropped or not _is_frozen_linear(self.get_base_layer(), x.dtype) else names[0]


def _is_frozen_linear(base: nn.Module, dtype: torch.dtype) -> bool:
    return type(base) is nn.Linear and not base.weight.requires_grad and base.weight.dtype == dtype


def _is_plain(layer: LoraLinear) -> bool:
    """Whether the adapters are low-rank terms and nothing else."""
    return not (layer.lora_variant or layer.fan_in_fan_out or any(layer.lora_bias.values()))


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
    if config.target_modules is not None:
        _check_targets(model, config.target_modules)
    _check_parameters(model, config.target_parameters or [])
    adapts_all = config.target_modules == _ALL
    experts = set(map(id, stacked_experts(model).values()))
    share = share_of_experts(model)
    try:
        with warnings.catch_warnings():
            for message in _SETTLED:
                warnings.filterwarnings("ignore", message=message)
            adapted = get_peft_model(model, config)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(f"PEFT cannot put this adapter on {type(model).__name__}: {error}") from error
    check_trainable(adapted)
    if adapts_all and experts and not any(isinstance(module, ParamWrapper) for module in adapted.modules()):
        _log.warning(
            "target_modules is all-linear, and the experts of this mixture, %.0f %% of its weights, are stacked "
            "parameters (%s) and no linear layers: the adapter leaves them as they are; set lora.experts to true "
            "(PEFT: target_parameters) to adapt them too",
            100 * share, ", ".join(expert_targets(model)),
        )
    return compute_in_base_dtype(adapted)


def _lora_config(model: PreTrainedModel, lora: LoraSettings) -> LoraConfig:
    """PEFT's config of our settings."""
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    if isinstance(targets, str) and targets != _ALL and targets.isidentifier():
        targets = [targets]  # a name, and no pattern of whole names
    parameters = expert_targets(model) if lora.experts else None
    if lora.experts and not parameters:
        raise ConfigError(
            f"lora.experts is true, and {type(model).__name__} has no stacked experts; leave it out"
        )
    return LoraConfig(
        task_type="CAUSAL_LM", target_modules=targets, target_parameters=parameters, r=lora.rank,
        lora_dropout=lora.dropout,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # annotated int; a fraction is as good
    )


def _check_targets(model: PreTrainedModel, targets: Any) -> None:
    """Raise if a name or pattern matches no layer: PEFT passes over those as long as another one matches."""
    if targets == _ALL:
        return
    names = [name for name, module in model.named_modules() if isinstance(module, _ADAPTABLE)]
    # PEFT takes a string for a pattern of the whole name, and names of a list for the name's end.
    ends = [] if isinstance(targets, str) else sorted(targets)
    patterns = {targets: targets} if isinstance(targets, str) else {end: rf"(.*\.)?{re.escape(end)}" for end in ends}
    unknown = [target for target, pattern in patterns.items() if not any(re.fullmatch(pattern, n) for n in names)]
    stacked = expert_targets(model)
    if stacked and not isinstance(model.config, PolicyConfig):  # PEFT knows what experts of the Hub were called
        unknown = [target for target in unknown if target.rpartition(".")[2] not in _FORMER_EXPERTS]
    if not unknown:
        return
    available = sorted({name.rsplit(".", 1)[-1] for name in names})
    message = (
        f"target_modules names {', '.join(unknown)}, and no layer of {type(model).__name__} that takes an adapter is "
        f"called so; use all-linear, or some of {', '.join(available)}"
    )
    if stacked:
        message += (
            f"; the experts of this mixture are stacked parameters ({', '.join(stacked)}): set lora.experts to true "
            "(PEFT: target_parameters) to adapt them"
        )
    raise ConfigError(message)


def _check_parameters(model: PreTrainedModel, targets: Iterable[str]) -> None:
    """Raise if PEFT's `target_parameters` names one that is not in the model: PEFT warns, and leaves it out."""
    names = [f".{name}" for name, _ in model.named_parameters()]
    unknown = sorted(target for target in targets if not any(name.endswith(f".{target}") for name in names))
    if unknown:
        stacked = expert_targets(model)
        raise ConfigError(
            f"target_parameters names {', '.join(unknown)}, and no parameter of {type(model).__name__} is called so; "
            + (f"its experts are {', '.join(stacked)}" if stacked else "leave it out: the model has no stacked experts")
        )


def compute_in_base_dtype(model: PeftModel) -> PeftModel:
    """Let the LoRA layers of any PeftModel, such as a loaded one, compute in the base's dtype; returns the model."""
    for module in model.modules():
        if type(module) is LoraLinear:
            module.__class__ = ComputeDtypeLinear
        elif type(module) is ParamWrapper:
            module.__class__ = GroupedExperts
    return model


def has_adapters(model: nn.Module) -> bool:
    """Whether adapters are wrapped around the model."""
    return isinstance(model, PeftModel)


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the model is its frozen base, exactly: the reference policy.

    Raises:
        ConfigError: the adapter was made by changing the base.
    """
    assert isinstance(model, PeftModel), "only a model with adapters has a base to go back to"
    check_base_is_reference(model)
    training = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, trained in training:  # PEFT lets all of an adapter train afterwards
            parameter.requires_grad = trained


def add_role(model: PeftModel, name: str, *, rank: int, alpha: float) -> None:
    """Put another LoRA adapter on the same frozen base, on the same layers as the one in use, which stays in use."""
    config: Any = copy.deepcopy(model.peft_config[model.active_adapter])
    config.r, config.lora_alpha, config.lora_dropout = rank, alpha, 0.0
    config.rank_pattern, config.alpha_pattern = {}, {}
    config.init_lora_weights, config.bias = True, "none"  # others write to the base
    config.modules_to_save = config.trainable_token_indices = None  # whole copies of what the role leaves as it is
    _put_role(model, name, config)


def load_role(model: PeftModel, name: str, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
    """Put a saved adapter on the same frozen base as another role; the one in use stays in use.

    Raises:
        CheckpointError: the tensors are not those of this adapter on this model.
        ConfigError: the adapter in use was made by changing the base.
    """
    check_base_is_reference(model)
    _put_role(model, name, config)
    fill_adapter(model, name, tensors)


def fill_adapter(model: PeftModel, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Give an adapter the tensors of its checkpoint, by PEFT's names.

    Raises:
        CheckpointError: one of the adapter's is missing, of another shape, or there is one more.
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
    training = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.add_adapter(name, config)
    compute_in_base_dtype(model)
    for parameter, trained in training:
        parameter.requires_grad = trained
    for parameter_name, parameter in model.named_parameters():
        if _is_of(parameter_name, name):
            parameter.requires_grad = False


@contextmanager
def in_role(model: PeftModel, name: str) -> Iterator[None]:
    """Within this context the adapter `name` is the one in use, and no other parameter of the model is in training."""
    before = model.active_adapter
    training = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.set_adapter(name)
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad = _is_of(parameter_name, name)
        yield
    finally:
        model.set_adapter(before)
        for parameter, trained in training:
            parameter.requires_grad = trained


def is_of_adapter(model: nn.Module, parameter: str) -> bool:
    """Whether the parameter of that name belongs to an adapter, whichever, and not to the base."""
    return isinstance(model, PeftModel) and any(_is_of(parameter, name) for name in model.peft_config)


def _is_of(parameter: str, adapter: str) -> bool:
    """Whether the parameter of that name is the adapter's: its name holds the adapter's, at the end or before it."""
    return f".{adapter}." in f"{parameter}."

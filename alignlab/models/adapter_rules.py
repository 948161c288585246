"""Rules that an adapter must follow to be trained exactly; the others are refused with the reason.

An adapter is taken if four things hold: the base with the adapter off is the model that it was put on, the merged
weights compute what the live model computes, the saved folder gives the trained model back, and the packed forward
pass reaches every part of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import Conv1d, Conv2d, LoraLayer, ParamWrapper
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraConv1dVariant, DoraConv2dVariant, DoraEmbeddingVariant, DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from alignlab.errors import ConfigError
from alignlab.models.config import PolicyConfig
from alignlab.models.expert_adapters import expert_targets

ALL_LINEAR = "all-linear"
_KEEPS_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")
_REPEATABLE = ("pissa", "olora")
_UNSUPPORTED = {
    "layer_replication": "it changes the base model",
    "alora_invocation_tokens": "it reads padded batches of its own",
    "arrow_config": "it routes between adapters",
    "megatron_config": "it is of Megatron's layers",
    "use_qalora": "it is of quantised bases",
    "velora_config": "its gradients are approximations",
    "kasa_config": "it changes the base model",
    "monteclora_config": "its weights are random in each forward pass",
    "use_bdlora": "its layers are of other shapes",
}
_ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d)
_FORMER_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_LAYERS = (LoraLinear, LoraEmbedding, Conv1d, Conv2d, ParamWrapper)
_DORA = (DoraLinearVariant, DoraEmbeddingVariant, DoraConv1dVariant, DoraConv2dVariant)


def check_lora_config(config: Any) -> None:
    """Raise if no adapter of this config can be trained, merged and saved exactly.

    Raises:
        ConfigError: with the field and what to use in its place.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    if not isinstance(config, LoraConfig) or kind != "LORA":
        raise ConfigError(
            f"the adapter is of PEFT's type {kind}, and must be LORA, the one that is trained, merged and sent to "
            "rollout engines exactly; use LoraSettings or peft.LoraConfig"
        )
    if config.task_type not in (None, "CAUSAL_LM"):
        task = getattr(config.task_type, "value", config.task_type)
        raise ConfigError(f"the adapter's task_type is {task}, and must be CAUSAL_LM; give task_type='CAUSAL_LM'")
    if config.bias != "none":
        raise ConfigError(
            f"the adapter's bias is {config.bias!r}, and must be 'none': it would train the biases of the base itself, "
            "which is the reference; use bias='none', or lora_bias=True where the layers have biases"
        )
    for name, reason in _UNSUPPORTED.items():
        if getattr(config, name, None):
            raise ConfigError(f"the adapter's {name} is set, and must not be: {reason}; leave it out")
    _check_start(config.init_lora_weights)


def _check_start(start: Any) -> None:
    if isinstance(start, str) and start.lower() in _REPEATABLE:
        return
    if not any(start is value or (isinstance(start, str) and start == value) for value in _KEEPS_THE_BASE):
        raise ConfigError(
            f"the adapter's init_lora_weights is {start!r}, which changes the base in a way that loading the saved "
            "adapter cannot repeat exactly; use True, 'gaussian', 'orthogonal' or 'eva' or, without a reference, "
            "'pissa' or 'olora'"
        )


def check_targets(model: PreTrainedModel, modules: Any, parameters: Iterable[str]) -> None:
    """Raise if a target of an adapter is not in the model; PEFT passes over it as long as another target is.

    Args:
        modules: PEFT's `target_modules`; None for none.
        parameters: PEFT's `target_parameters`.

    Raises:
        ConfigError: with the names that the model has.
    """
    stacked = expert_targets(model)
    names = [name for name, module in model.named_modules() if isinstance(module, _ADAPTABLE)]
    unknown = _unknown_modules(modules, names)
    if stacked and not isinstance(model.config, PolicyConfig):
        # Experts of Hub families were modules of these names once; PEFT maps the names to the stacked parameters.
        unknown = [target for target in unknown if target.rpartition(".")[2] not in _FORMER_EXPERTS]
    if unknown:
        available = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
        experts = (
            f"; the experts of this mixture are stacked parameters ({', '.join(stacked)}): set lora.experts to true "
            "(PEFT: target_parameters) to adapt them"
        )
        raise ConfigError(
            f"target_modules names {', '.join(unknown)}, and no layer of {type(model).__name__} that takes an adapter "
            f"is called so; use all-linear, or some of {available}{experts if stacked else ''}"
        )
    _check_parameters(model, parameters, stacked)


def _unknown_modules(targets: Any, names: Sequence[str]) -> list[str]:
    """Return the target modules that match no name."""
    if targets is None or targets == ALL_LINEAR:
        return []
    if isinstance(targets, str):  # to PEFT a string is a pattern of the whole name, and a list holds ends of names
        patterns = {targets: targets}
    else:
        patterns = {end: rf"(.*\.)?{re.escape(end)}" for end in sorted(targets)}
    return [target for target, pattern in patterns.items() if not any(re.fullmatch(pattern, name) for name in names)]


def _check_parameters(model: PreTrainedModel, targets: Iterable[str], stacked: Sequence[str]) -> None:
    names = [f".{name}" for name, _ in model.named_parameters()]
    unknown = sorted(target for target in targets if not any(name.endswith(f".{target}") for name in names))
    if unknown:
        raise ConfigError(
            f"target_parameters names {', '.join(unknown)}, and no parameter of {type(model).__name__} is called so; "
            + (f"its experts are {', '.join(stacked)}" if stacked else "leave it out: the model has no stacked experts")
        )


def check_base_is_reference(model: nn.Module) -> None:
    """Raise if the base with the adapters off is another model than the one that they were put on.

    Raises:
        ConfigError: the adapter was made by changing the base (PiSSA, OLoRA).
    """
    for config in active_configs(model):
        start = config.init_lora_weights
        if isinstance(start, str) and start not in _KEEPS_THE_BASE:
            raise ConfigError(
                f"the adapter's init_lora_weights is {start!r}, which moves a part of the base into the adapter: with "
                "the adapter off the base is not the model that the training starts from, so it can be no reference, "
                "reward model's base or judge; use init_lora_weights=True, or train without those (SFT; kl.coef 0 and "
                "kl.measure_every_steps null)"
            )


def check_trainable(model: PeftModel) -> None:
    """Raise if a model with adapters, as a user made it, cannot be trained, merged and saved exactly.

    Raises:
        ConfigError: with what has to be changed on the model.
    """
    configs: list[Any] = list(model.peft_config.values())
    for config in configs:
        if getattr(config, "is_prompt_learning", False):
            raise ConfigError(
                f"the adapter is of PEFT's type {config.peft_type.value}, which puts tokens before the prompt, and the "
                "packed forward pass has no place for them; use LoraSettings or peft.LoraConfig"
            )
    for config in active_configs(model):
        check_lora_config(config)
    lm: Any = model.get_base_model()
    head = lm.get_output_embeddings()
    if isinstance(head, LoraLayer):
        raise ConfigError(
            "an adapter is on the output head (lm_head), which must be frozen: log-probs are computed from its weight "
            "chunk by chunk; take it out of target_modules, or train the whole head: modules_to_save=['lm_head']"
        )
    _check_trained(model)
    for name, layer in tuner_layers(model):
        _check_state(name, layer)
        if isinstance(layer, LoraLayer):
            check_layer(name, layer)


def active_configs(model: nn.Module) -> list[Any]:
    """Return the configs of the active adapters; none without adapters."""
    if not isinstance(model, PeftModel):
        return []
    return [model.peft_config[name] for name in active_names(model) if name in model.peft_config]


def active_names(model: PeftModel) -> list[str]:
    """Return the names of the active adapters."""
    names = model.active_adapters
    return [names] if isinstance(names, str) else list(names)


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) of the layers that PEFT wraps around others."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))


def _check_trained(model: PeftModel) -> None:
    """Raise if a weight of the base is in training."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    of_base = [name for name in trained if not any(f".{adapter}." in f"{name}." for adapter in model.peft_config)]
    if of_base:
        raise ConfigError(
            f"{of_base[0]} ({len(of_base)} weights in all) is in training and belongs to the base, which is the "
            "reference, and which the adapter's folder leaves out; set its requires_grad to False, or name its module "
            "in modules_to_save"
        )


def _check_state(name: str, layer: Any) -> None:
    """Raise if a layer is merged, switched off, under several adapters, or scaled by hand."""
    active = [adapter for adapter in layer.active_adapters if adapter in layer._get_available_adapters()]
    if layer.merged:
        raise ConfigError(f"the adapter on {name} is merged into its base; call model.unmerge_adapter() first")
    if layer.disable_adapters:
        raise ConfigError(
            f"the adapter on {name} is switched off, so nothing would train; call model.enable_adapter_layers()"
        )
    if len(active) > 1:
        raise ConfigError(
            f"the adapters {', '.join(active)} are in use at once, and one is trained and saved; choose it with "
            "model.set_adapter(name), or join them with model.add_weighted_adapter"
        )
    for adapter in active:
        if isinstance(layer, LoraLayer):
            root = math.sqrt(layer.r[adapter]) if layer.use_rslora.get(adapter) else layer.r[adapter]
            expected = layer.lora_alpha[adapter] / root
            if not math.isclose(layer.scaling[adapter], expected, rel_tol=1e-6):
                raise ConfigError(
                    f"the adapter on {name} is scaled by {layer.scaling[adapter]:g}, and must be by alpha / rank = "
                    f"{expected:g}, which is all that its folder keeps; undo set_scale, and give lora_alpha instead"
                )


def check_layer(name: str, layer: LoraLayer) -> None:
    """Raise if the adapter on a layer cannot be merged into plain weights of the same names.

    Raises:
        ConfigError: with the layer.
    """
    base: Any = layer.get_base_layer()
    if not isinstance(layer, _LAYERS):
        raise ConfigError(
            f"the adapter on {name} is of a layer ({type(base).__name__}) whose weights cannot be merged exactly; "
            "take it out of target_modules"
        )
    if getattr(base, "groups", 1) > 1:
        raise ConfigError(
            f"the adapter on {name} is on a convolution of {base.groups} groups, whose weights cannot be merged; "
            "take it out of target_modules"
        )
    for adapter in layer.active_adapters:
        variant = layer.lora_variant.get(adapter)
        if variant is not None and not isinstance(variant, _DORA):
            raise ConfigError(
                f"the adapter on {name} is of the form {type(variant).__name__}, which cannot be merged into the base; "
                "use plain LoRA, rsLoRA or DoRA"
            )
        if layer.lora_bias.get(adapter) and getattr(base, "bias", None) is None:
            raise ConfigError(
                f"the adapter's lora_bias is set, and {name} has no bias that it could be merged into; leave "
                "lora_bias out"
            )

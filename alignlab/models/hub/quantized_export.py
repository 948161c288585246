"""Checkpoints whose linear layers are rounded to 8 or 4 bits, as `transformers` and vLLM load them.

Weights are rounded to the nearest value of their scale, without calibration; scales of integers are those of
`weight_rounding`. The format and the packing are those of the library `compressed-tensors`. Embeddings, head and norms
stay as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from alignlab.errors import ConfigError
from alignlab.files.private_folders import temporary_folder
from alignlab.models.hub.checkpoints import save_model
from alignlab.models.hub.families import write_hub_config
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.models.weight_rounding import from_codes, to_codes, weight_scales

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

Scheme = Literal["int8", "int4", "fp8"]
SCHEMES: dict[Scheme, str] = {
    "int8": "weights in int8 with a scale an output, activations in int8 with a scale a token",
    "int4": "weights in int4 with a scale for each group of inputs, activations as they are",
    "fp8": "weights in float8 (e4m3) with a scale an output, activations in float8 with a scale a token",
}


def check_quantizable(model: PreTrainedModel, scheme: Scheme, group_size: int) -> PolicyForCausalLM:
    """Return the model, after checking that it can be written with this scheme.

    Args:
        group_size: inputs that share a scale, of int4.

    Raises:
        ConfigError: the model is of no Hub family, has experts, or a layer's inputs do not divide into groups.
    """
    if not isinstance(model, PolicyForCausalLM) or write_hub_config(model.config) is None:
        raise ConfigError(
            f"a quantized checkpoint is of a Hub family that alignlab writes, and {type(model).__name__} is of none "
            "here; quantize it by what made it"
        )
    if model.config.num_routers:
        raise ConfigError("quantized are linear layers, and the model has experts; take a dense model")
    if scheme == "int4":
        for name, module in model.get_decoder().named_modules():
            if isinstance(module, torch.nn.Linear) and module.in_features % group_size:
                raise ConfigError(
                    f"--group-size is {group_size}, and must divide the inputs of each linear layer; {name} has "
                    f"{module.in_features}; use 32 or 64"
                )
    return model


def write_quantized(model: PolicyForCausalLM, folder: Path, scheme: Scheme, group_size: int) -> float:
    """Write a checked model's config and rounded weights into a folder.

    Returns:
        ||W - Q(W)|| / ||W|| over all rounded weights.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with temporary_folder(size) as whole:
        save_model(model, whole)
        hub = AutoModelForCausalLM.from_pretrained(whole, dtype=model.dtype)
    groups = {"group_0": _scheme(scheme, group_size)}
    config = QuantizationConfig(config_groups=groups, ignore=["lm_head"], quantization_status="initialized")
    apply_quantization_config(hub, config)
    error = _set_scales(hub)
    compressor = ModelCompressor.from_pretrained_model(hub)
    compressor.compress_model(hub)
    hub.save_pretrained(folder)
    compressor.update_config(str(folder))
    return error


def _scheme(scheme: Scheme, group_size: int) -> QuantizationScheme:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    if scheme == "int4":
        weights = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=group_size, symmetric=True)
        return QuantizationScheme(targets=["Linear"], weights=weights)
    kind = {"int8": "int", "fp8": "float"}[scheme]
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=8, type=kind, strategy="channel", symmetric=True),
        input_activations=QuantizationArgs(num_bits=8, type=kind, strategy="token", symmetric=True, dynamic=True),
    )


@torch.no_grad()
def _set_scales(hub: PreTrainedModel) -> float:
    """Give each layer's weights the scales of their extremes; return the relative error of rounding."""
    from compressed_tensors.quantization import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    lost = whole = 0.0
    module: Any
    for module in hub.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        weight, args = module.weight, module.quantization_scheme.weights
        if args.type == "int":
            scale = weight_scales(weight, args.num_bits, args.group_size)
            rounded = from_codes(to_codes(weight, scale, args.num_bits), scale)
            module.weight_scale.copy_(scale.view_as(module.weight_scale))
        else:
            scale, zero_point = calculate_qparams(weight.float().amin(-1), weight.float().amax(-1), args)
            module.weight_scale.copy_(scale.view_as(module.weight_scale))
            rounded = fake_quantize(weight, module.weight_scale, zero_point.view_as(module.weight_scale), args)
        lost += float((weight.float() - rounded.float()).square().sum())
        whole += float(weight.float().square().sum())
    return (lost / whole) ** 0.5

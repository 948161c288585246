"""A mixture of experts made of a dense model, whose feed-forward layers become experts.

Copied experts compute at first what the dense model computes, and training tells them apart.

References: Komatsuzaki et al. (2022), arXiv:2212.05055, Sec. 3; drop-upcycling: Nakamura et al. (2025),
arXiv:2502.19261, Sec. 3; virtual groups of fine-grained experts: He et al. (2024), arXiv:2410.07524, Sec. 3.

Shapes: E experts, K experts a token, G slices of a feed-forward layer, H hidden size, I intermediate size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from alignlab.errors import ConfigError
from alignlab.models.config import PolicyConfig
from alignlab.models.layer_sharing import refuse_sharing
from alignlab.models.router_state import is_router_state
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.models.weight_view import view_of, whole_tensors

Method = Literal["copy", "drop", "virtual_groups"]
_ALIKE = "gates of a token's experts must sum to 1 for the mixture to compute what the dense model computes"
_NEW_ROUTERS = ("topk", "noisy_topk", "hash", "sinkhorn", "reinforce")


def upcycled(
    dense: PreTrainedModel | PeftModel, *, num_experts: int, num_experts_per_tok: int, method: Method = "copy",
    slices: int = 1, drop_frac: float = 0.5, layers: Sequence[int] | None = None, norm_topk_prob: bool = True,
    router: Mapping[str, Any] | None = None,
) -> PolicyForCausalLM:
    """Return a mixture of experts made of a dense model, in its dtype and in evaluation mode.

    - `copy`: every expert is the whole feed-forward layer. The output is the dense model's.
    - `drop`: copies, each with a part of its intermediate units drawn anew from a normal distribution with the mean
      and standard deviation of the units that it replaces. The output differs by what was drawn.
    - `virtual_groups`: each expert is one of G slices of the layer, and E / G replicas hold all of them. The router
      starts with equal rows within a replica, so a token takes whole replicas. The output is the dense model's, in
      float32; rounding to 16 bits would mix the slices of replicas that tie.

    New weights come from torch's global generator.

    Args:
        dense: an in-house dense model, whole on this process.
        num_experts: E, of each sparse layer.
        num_experts_per_tok: K.
        method: see above.
        slices: G, of virtual groups; it divides the intermediate size, E and K.
        drop_frac: fraction of the units that `drop` draws anew, in [0, 1].
        layers: indices of the layers that become sparse; None is all.
        norm_topk_prob: gates of a token's experts sum to 1.
        router: other router fields of the config, such as `router_type`.

    Raises:
        ConfigError: the model is no dense model of ours, or the mixture would not begin where the dense model ends.
    """
    if not isinstance(dense, PolicyForCausalLM) or dense.config.sparse_layers:
        raise ConfigError(
            f"a mixture is made of a dense model of a family that alignlab knows, and this is {type(dense).__name__}"
            f"{' with experts' if isinstance(dense, PolicyForCausalLM) else ''}; use a model such as Qwen3 or Llama"
        )
    refuse_sharing(dense.config, what="experts of a layer are made of its own feed-forward")
    chosen = range(dense.config.num_hidden_layers) if layers is None else layers
    _check(dense, method, slices, drop_frac, chosen, num_experts, num_experts_per_tok)
    config = _sparse_config(
        dense.config, chosen, num_experts=num_experts, num_experts_per_tok=num_experts_per_tok,
        moe_intermediate_size=dense.config.intermediate_size // slices, norm_topk_prob=norm_topk_prob, **(router or {}),
    )
    _check_gates(config)
    mixture: Any = PolicyForCausalLM(config)
    mixture.to(dense.dtype)
    weights = _weights(dense, mixture, chosen, method=method, slices=slices, drop_frac=drop_frac)
    mixture.load_state_dict(weights, strict=False)
    mixture.tie_weights()
    mixture.generation_config = copy.deepcopy(dense.generation_config)
    result: PolicyForCausalLM = mixture.to(dense.device).eval()
    return result


def _check(
    dense: PolicyForCausalLM, method: str, slices: int, drop_frac: float, layers: Sequence[int], num_experts: int,
    num_chosen: int,
) -> None:
    config = dense.config
    wrong = [index for index in layers if not 0 <= index < config.num_hidden_layers]
    if not layers or wrong:
        raise ConfigError(
            f"layers is {list(layers)}, and must hold numbers from 0 to {config.num_hidden_layers - 1}, the dense "
            "model's layers; leave it out for all"
        )
    if config.mlp_bias:
        raise ConfigError("mlp_bias is true, and experts have no biases; use a model without them")
    if not 0 <= drop_frac <= 1:
        raise ConfigError(f"drop_frac is {drop_frac}, and must be in [0, 1]; use 0.5")
    if method == "virtual_groups":
        _check_slices(dense, slices, num_experts, num_chosen)
    elif slices != 1:
        raise ConfigError(f"slices is {slices}, and is of method virtual_groups; use that, or leave slices out")


def _check_slices(dense: PolicyForCausalLM, slices: int, num_experts: int, num_chosen: int) -> None:
    """Raise a ConfigError unless experts can be slices of a dense layer, and a token takes whole replicas of it."""
    for name, value in (
        ("intermediate_size", dense.config.intermediate_size), ("num_experts", num_experts),
        ("num_experts_per_tok", num_chosen),
    ):
        if slices < 2 or value % slices:
            raise ConfigError(
                f"slices is {slices}, and must be 2 or more and divide {name} ({value}): a token takes whole replicas "
                "of the layer; change one of the two"
            )
    if dense.dtype != torch.float32:
        raise ConfigError(
            f"the model is in {str(dense.dtype).removeprefix('torch.')}, in which replicas of virtual groups tie, and "
            "a token would mix their slices; load it in float32"
        )


def _sparse_config(dense: PolicyConfig, layers: Sequence[int], **fields: Any) -> PolicyConfig:
    """Return a dense model's config with experts in some layers. It is of another family, so no Hub config stays."""
    config = {name: value for name, value in dense.to_dict().items() if name not in ("model_type", "hub_config")}
    kinds = ["sparse" if index in layers else "dense" for index in range(dense.num_hidden_layers)]
    config |= {"mlp_layer_types": kinds, "attn_implementation": dense._attn_implementation, **fields}
    return PolicyConfig(**config)


def _check_gates(config: PolicyConfig) -> None:
    kind, chosen = config.router_type, config.num_experts_per_tok
    if kind not in _NEW_ROUTERS:
        raise ConfigError(f"router_type is {kind}, and {_ALIKE}; use {' or '.join(_NEW_ROUTERS)}")
    for name in ("expert_bias", "router_linear_bias", "swiglu_limit"):
        value, unset = getattr(config, name), getattr(type(config), name)
        if value != unset:
            raise ConfigError(
                f"{name} is {str(value).lower()}, and experts begin as copies of a feed-forward that has none; leave "
                "it out"
            )
    sums_to_one = config.norm_topk_prob or (config.scoring_func == "softmax" and chosen == config.num_experts)
    if not sums_to_one:
        raise ConfigError(
            f"norm_topk_prob is false with {chosen} of {config.num_experts} experts a token, and {_ALIKE}; use "
            "norm_topk_prob: true, or all experts for each token"
        )
    if config.routed_scaling_factor != 1 or config.n_shared_experts or config.capacity_factor is not None:
        raise ConfigError(
            f"routed_scaling_factor is {config.routed_scaling_factor}, n_shared_experts {config.n_shared_experts} and "
            f"capacity_factor {config.capacity_factor}, and {_ALIKE}, with nothing dropped or added; leave them out"
        )


def _weights(
    dense: PolicyForCausalLM, mixture: PolicyForCausalLM, layers: Sequence[int], *, method: Method, slices: int,
    drop_frac: float,
) -> dict[str, Tensor]:
    """Return the mixture's weights, routers that start at random aside."""
    state = {name: tensor.detach() for name, tensor in whole_tensors(view_of(dense)) if not is_router_state(name)}
    config = mixture.config
    for index in layers:
        prefix = f"model.layers.{index}.mlp."
        gate, up, down = (state.pop(f"{prefix}{name}_proj.weight") for name in ("gate", "up", "down"))
        experts = [_slice(gate, up, down, expert % slices, slices) for expert in range(config.num_experts)]
        if method == "drop":
            experts = [_redrawn(*expert, drop_frac=drop_frac) for expert in experts]
        state[f"{prefix}experts.gate_up_proj"] = torch.stack([torch.cat([g, u]) for g, u, _ in experts])
        state[f"{prefix}experts.down_proj"] = torch.stack([d for *_, d in experts])
        if slices > 1:
            router = mixture.get_parameter(f"{prefix}gate.weight").detach()
            state[f"{prefix}gate.weight"] = router[::slices].repeat_interleave(slices, dim=0)
    return state


def _slice(gate: Tensor, up: Tensor, down: Tensor, number: int, slices: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return one of the slices of a feed-forward layer; gates share one replica's weight among them, hence the G."""
    size = len(gate) // slices
    units = slice(number * size, (number + 1) * size)
    return gate[units], up[units], down[:, units] * slices if slices > 1 else down


def _redrawn(gate: Tensor, up: Tensor, down: Tensor, *, drop_frac: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return a feed-forward layer in which the same random units of all three weights are drawn anew."""
    units = torch.randperm(len(gate), device=gate.device)[: round(drop_frac * len(gate))]
    gate, up, down = gate.clone(), up.clone(), down.clone()
    if len(units):
        for weight in (gate, up, down.t()):
            replaced = weight[units].float()
            drawn = replaced.mean() + replaced.std() * torch.randn_like(replaced)
            weight[units] = drawn.to(weight.dtype)
    return gate, up, down

"""Rules of a config's router fields: which values there are, and which go together."""

from __future__ import annotations

from typing import Any

from alignlab.models.config_rules import require as _require

ROUTER_TYPES = ("topk", "noisy_topk", "hash", "base", "sinkhorn", "expert_choice", "reinforce")
SCORING_FUNCS = ("softmax", "sigmoid", "sqrtsoftplus")
TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
CAPACITY_PRIORITIES = ("order", "score")
_RANKED_BY_SCORE = ("topk", "noisy_topk")
_NOT_NEGATIVE = (
    "router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_rate", "router_seq_aux_loss_coef",
    "router_device_aux_loss_coef", "router_comm_aux_loss_coef", "router_importance_loss_coef", "router_load_loss_coef",
    "router_reinforce_coef",
)  # fmt: skip
_BALANCE = (
    "router_aux_loss_coef", "router_seq_aux_loss_coef", "router_device_aux_loss_coef", "router_comm_aux_loss_coef"
)


OF_SPARSE_LAYERS = (
    "router_type", "scoring_func", "topk_method", "n_group", "topk_group", "capacity_factor", "capacity_priority",
    "norm_topk_prob", "routed_scaling_factor", "router_sinkhorn_rounds", "router_bias", "router_linear_bias",
    "router_in_fp32", "num_experts_per_tok", "moe_intermediate_size", "expert_bias", "swiglu_limit", "swiglu_alpha",
    "shared_expert_intermediate_size", "shared_expert_gate", *_NOT_NEGATIVE,
)  # fmt: skip
"""Fields that only sparse layers read."""


def check_no_router(config: Any) -> None:
    """Raise if a `PolicyConfig` without sparse layers has fields that they alone read.

    Raises:
        ConfigError: with the field.
    """
    for name in OF_SPARSE_LAYERS:
        value, unset = getattr(config, name), getattr(type(config), name)
        _require(value == unset, f"{name} is {value!r}, but no layer is sparse; make one sparse or leave it out")


def check_router(config: Any) -> None:
    """Raise unless the router fields of a `PolicyConfig` with sparse layers go together.

    Raises:
        ConfigError: with the rule, the value and the fix.
    """
    for name, allowed in (
        ("router_type", ROUTER_TYPES), ("scoring_func", SCORING_FUNCS), ("topk_method", TOPK_METHODS),
        ("capacity_priority", CAPACITY_PRIORITIES),
    ):
        value = getattr(config, name)
        _require(value in allowed, f"{name} is {value!r}, and must be {' or '.join(allowed)}")
    for name in _NOT_NEGATIVE:
        value = getattr(config, name)
        _require(value >= 0, f"{name} is {value}, and must not be negative; use 0 to turn it off")
    _check_groups(config)
    _check_capacity(config)
    _check_balance(config)
    _check_type(config)
    _check_clamp(config)


def _check_groups(config: Any) -> None:
    groups, best, method = config.n_group, config.topk_group, config.topk_method
    limited = method != "greedy"
    if limited:
        _require(
            config.router_type in _RANKED_BY_SCORE,
            f"topk_method is {method}, and router_type {config.router_type} chooses in another way; use "
            "topk_method: greedy",
        )
        _require(
            groups is not None and best is not None,
            f"topk_method is {method}, which needs n_group and topk_group; give both, or use topk_method: greedy",
        )
    if groups is None:
        _require(best is None, f"topk_group is {best}, and n_group is not given; give it, or leave topk_group out")
        return
    divisors = [n for n in range(1, config.num_experts + 1) if config.num_experts % n == 0]
    _require(
        groups in divisors,
        f"n_group is {groups}, and must divide num_experts ({config.num_experts}); use one of "
        f"{', '.join(map(str, divisors))}",
    )
    _require(
        best is None or 1 <= best <= groups,
        f"topk_group is {best}, and must be from 1 to n_group ({groups})",
    )
    size = config.num_experts // groups
    _require(
        not limited or best * size >= config.num_experts_per_tok,
        f"topk_group ({best}) groups of {size} experts hold {(best or 0) * size}, and must hold num_experts_per_tok "
        f"({config.num_experts_per_tok}); raise topk_group",
    )
    _require(
        method != "noaux_tc" or size >= 2,
        f"n_group is {groups}, and under topk_method noaux_tc a group must have 2 experts or more, for its score is "
        f"the sum of two; use {config.num_experts // 2} groups or fewer",
    )


def _check_capacity(config: Any) -> None:
    factor = config.capacity_factor
    if factor is None:
        return
    _require(factor > 0, f"capacity_factor is {factor}, and must be above 0; use 1.25, or leave it out to drop nothing")
    _require(
        config.router_type not in ("base", "expert_choice"),
        f"capacity_factor is {factor}, and router_type {config.router_type} gives every expert as many tokens itself; "
        "leave it out",
    )


def _check_balance(config: Any) -> None:
    for name in ("router_device_aux_loss_coef", "router_comm_aux_loss_coef"):
        needed = ("n_group",) if "device" in name else ("n_group", "topk_group")
        missing = [field for field in needed if getattr(config, field) is None]
        _require(
            getattr(config, name) == 0 or not missing,
            f"{name} is {getattr(config, name)}, which balances groups of experts, and {' and '.join(missing)} must "
            "be given",
        )
    for name in (*_BALANCE, "router_bias_update_rate"):
        chosen_otherwise = config.router_type in ("hash", "expert_choice")
        _require(
            getattr(config, name) == 0 or not chosen_otherwise,
            f"{name} is {getattr(config, name)}, and must be 0 under router_type {config.router_type}, whose load it "
            "cannot move",
        )
    _require(
        config.router_bias_update_rate == 0 or config.router_type in _RANKED_BY_SCORE,
        f"router_bias_update_rate is {config.router_bias_update_rate}, and router_type {config.router_type} has no "
        "bias; use 0",
    )
    _require(
        not config.router_bias or config.router_type in _RANKED_BY_SCORE,
        f"router_bias is true, and router_type {config.router_type} has no bias; leave it out",
    )


def _check_clamp(config: Any) -> None:
    limit, alpha, unset = config.swiglu_limit, config.swiglu_alpha, type(config).swiglu_alpha
    _require(limit is None or limit > 0, f"swiglu_limit is {limit}, and must be above 0; use 7, or leave it out")
    _require(
        limit is not None or alpha == unset,
        f"swiglu_alpha is {alpha}, and swiglu_limit is not given, without which experts compute hidden_act; give it, "
        "or leave swiglu_alpha out",
    )
    _require(
        limit is None or config.hidden_act == "silu",
        f"swiglu_limit is {limit}, which is of SwiGLU, and hidden_act is {config.hidden_act}; use silu",
    )


def _check_type(config: Any) -> None:
    kind = config.router_type
    for name in ("router_importance_loss_coef", "router_load_loss_coef"):
        _require(
            getattr(config, name) == 0 or kind == "noisy_topk",
            f"{name} is {getattr(config, name)}, and is a loss of router_type noisy_topk; use 0",
        )
    _require(
        (config.router_reinforce_coef > 0) == (kind == "reinforce"),
        f"router_reinforce_coef is {config.router_reinforce_coef}, and must be above 0 exactly where router_type is "
        f"reinforce; use {0.01 if kind == 'reinforce' else 0}",
    )
    _require(
        not config.router_linear_bias or kind in ("topk", "sinkhorn"),
        f"router_linear_bias is true, and router_type {kind} is defined without a bias; leave it out",
    )
    softmax = ("noisy_topk", "expert_choice", "reinforce")
    needed = "sigmoid" if kind == "base" else "softmax"
    _require(
        kind not in (*softmax, "base") or config.scoring_func == needed,
        f"scoring_func is {config.scoring_func}, and router_type {kind} is defined with {needed}; use it",
    )
    _require(
        kind not in ("base", "expert_choice") or not config.norm_topk_prob,
        f"norm_topk_prob is true, and under router_type {kind} would leave the router without a gradient, or tokens "
        "with another sum of gates; use false",
    )
    _require(
        kind != "base" or config.num_experts_per_tok == 1,
        f"num_experts_per_tok is {config.num_experts_per_tok}, and router_type base assigns one expert a token; use 1",
    )
    _require(
        config.router_sinkhorn_rounds >= 1,
        f"router_sinkhorn_rounds is {config.router_sinkhorn_rounds}, and must be at least 1; use 8",
    )

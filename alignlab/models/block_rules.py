"""Rules of a config's blocks: norms and their places, feed-forwards, and what multiplies embeddings and queries."""

from __future__ import annotations

import math

from alignlab.models.blocks import NORM_PLACES
from alignlab.models.config import PolicyConfig
from alignlab.models.config_rules import require
from alignlab.models.layers import ACTIVATIONS, NORMS

QK_NORM_SCOPES = ("head", "all_heads")


def check_blocks(config: PolicyConfig) -> None:
    """Raise if a config's blocks are impossible.

    Raises:
        ConfigError: with the field, its value, and what to change.
    """
    for name, allowed in (
        ("norm_type", NORMS), ("norm_position", NORM_PLACES), ("hidden_act", ACTIVATIONS),
        ("qk_norm_scope", QK_NORM_SCOPES),
    ):
        value = getattr(config, name)
        require(value in allowed, f"{name} is {value!r}, and must be {' or '.join(allowed)}")
    for name in ("embedding_multiplier", "query_pre_attn_scalar"):
        value = getattr(config, name)
        require(
            value is None or (math.isfinite(value) and value > 0),
            f"{name} is {value}, and must be a positive number; leave it out for what other models do",
        )
    dropout = config.residual_dropout
    require(0 <= dropout < 1, f"residual_dropout is {dropout}, and must be in [0, 1); use 0")
    require(
        not config.parallel_attn or config.norm_position == "pre",
        f"parallel_attn is true with norm_position {config.norm_position}, and attention and feed-forward that run in "
        "parallel read one norm of the layer's input; use norm_position: pre",
    )
    require(
        config.qk_norm_scope == "head" or config.use_qk_norm,
        "qk_norm_scope is all_heads, and use_qk_norm is false; set it to true, or leave qk_norm_scope out",
    )
    _check_mtp(config)
    _check_feed_forward(config)


def _check_mtp(config: PolicyConfig) -> None:
    require(
        config.num_mtp_layers in (0, 1),
        f"num_mtp_layers is {config.num_mtp_layers}, and must be 0 or 1: one token beyond the next is predicted",
    )
    kind, last_is_sparse = config.mtp_mlp_layer_type, config.num_hidden_layers - 1 in config.sparse_layers
    require(kind in ("dense", "sparse"), f"mtp_mlp_layer_type is {kind!r}, and must be dense or sparse")
    require(
        kind == "dense" or (last_is_sparse and config.router_type == "topk"),
        "mtp_mlp_layer_type is sparse, and must be dense where the last layer has no experts, or router_type is not "
        "topk; use dense",
    )
    coef = config.mtp_loss_coef
    require(coef > 0 and math.isfinite(coef), f"mtp_loss_coef is {coef}, and must be positive; use 0.1")
    if not config.num_mtp_layers:
        for name in ("mtp_loss_coef", "mtp_detach", "mtp_mlp_layer_type"):
            value, unset = getattr(config, name), getattr(type(config), name)
            fix = "use num_mtp_layers: 1, or leave it out"
            require(value == unset, f"{name} is {value}, and num_mtp_layers is 0; {fix}")


def _check_feed_forward(config: PolicyConfig) -> None:
    require(
        config.mlp_gated or not config.sparse_layers,
        "mlp_gated is false, and must be true where a layer is sparse: experts are gated; leave it out",
    )
    require(
        not config.fused_projections or not config.sparse_layers,
        "fused_projections is true, and must be false where a layer is sparse, whose experts and shared experts have "
        "matrices of their own; leave it out",
    )
    require(
        not config.fused_projections or config.mlp_gated,
        "fused_projections is true, which fuses the gate with the up projection, and mlp_gated is false; leave one of "
        "the two out",
    )

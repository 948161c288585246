"""Rules of a config's attention: of each kind that `layer_types` names, and of fields that only some kinds read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from alignlab.models import latent_attention, mixture_of_heads
from alignlab.models.attention import Attention
from alignlab.models.attention_kinds import ATTENTION_KINDS
from alignlab.models.config import ROPE_TYPES, PolicyConfig
from alignlab.models.config_rules import require
from alignlab.models.latent_attention import LatentAttention
from alignlab.models.mixing_layer import MixingLayer
from alignlab.models.mixture_of_heads import MixtureOfHeads
from alignlab.models.recurrent import layer
from alignlab.models.recurrent.layer import RecurrentLayer

_NAMES = {
    **dict.fromkeys(latent_attention.FIELDS, "latent_attention"), **dict.fromkeys(layer.FIELDS, "recurrent"),
    **dict.fromkeys(mixture_of_heads.FIELDS, "mixture_of_heads"),
}  # fmt: skip
"""What layers are called that alone read a field."""
_OF_ATTENTION = (
    "use_qk_norm", "attention_sinks", "attn_logit_softcapping", "query_pre_attn_scalar", "attention_bias",
    "attention_out_bias", "attention_dropout",
)  # fmt: skip
"""Fields that recurrent layers do not read."""
_SCALING_OPTIONS = {
    "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings", "factor"),
}  # fmt: skip
"""Options that a rotation must have, by its type."""


def check_attention(config: PolicyConfig) -> None:
    """Raise if a config's attention is impossible.

    Raises:
        ConfigError: with the field, its value, and what to change.
    """
    _check_layer_types(config)
    _check_rotation(config)
    dropout = config.attention_dropout
    require(0 <= dropout < 1, f"attention_dropout is {dropout}, and must be in [0, 1); use 0")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        cap = getattr(config, name)
        require(cap is None or cap > 0, f"{name} is {cap}, and must be positive; leave it out for no cap")
    classes = _classes(config)
    for kind in classes:
        kind.check_config(config)
    _check_fields_are_read(config, classes)
    base, windowed = config.rope_local_base_freq, any(kind.has_window for kind in classes)
    require(
        base is None or (base > 0 and windowed),
        f"rope_local_base_freq is {base}, and must be positive, and given only where layer_types holds a kind with a "
        "window; leave it out",
    )
    factor = config.rotary_factor
    require(
        factor == 1 or any(issubclass(kind, Attention | MixtureOfHeads) for kind in classes),
        f"partial_rotary_factor is {factor}, but no layer rotates a part of its heads: of latent_attention, "
        "qk_rope_head_dim says how much is rotated, and recurrent layers rotate nothing; leave it out",
    )


def _check_fields_are_read(config: PolicyConfig, classes: Sequence[type[MixingLayer]]) -> None:
    """Raise a ConfigError if a field is given that no kind of layer of the config reads."""
    for name in _unread_fields(classes):
        value, layers = getattr(config, name), _NAMES[name]
        require(value is None, f"{name} is {value}, but no layer is {layers}; make one so or leave it out")
    for name in _OF_ATTENTION if _is_recurrent(classes) else ():
        value = getattr(config, name)
        require(not value, f"{name} is {value}, but all layers are recurrent, which have none; leave it out")


def drop_unread_fields(config: PolicyConfig) -> None:
    """Reset the fields that no kind of layer of a config reads, as where its layers are a part of another's."""
    classes = _classes(config)
    if not any(kind.has_window for kind in classes):
        config.sliding_window = config.rope_local_base_freq = None
    for name in _unread_fields(classes):
        setattr(config, name, None)
    for name in (*_OF_ATTENTION, "qk_norm_scope") if _is_recurrent(classes) else ():
        setattr(config, name, False if name == "attention_out_bias" else getattr(type(config), name))
    if not any(issubclass(kind, Attention) for kind in classes) and config.rope_parameters is not None:
        rope = config.rope_parameters
        config.rope_parameters = {name: value for name, value in rope.items() if name != "partial_rotary_factor"}


def _unread_fields(classes: Iterable[type[MixingLayer]]) -> list[str]:
    """Return the fields that only kinds of layers read which are not among `classes`."""
    owners = (
        (LatentAttention, latent_attention.FIELDS), (RecurrentLayer, layer.FIELDS),
        (MixtureOfHeads, mixture_of_heads.FIELDS),
    )  # fmt: skip
    return [
        name for owner, fields in owners if not any(issubclass(kind, owner) for kind in classes) for name in fields
    ]


def _is_recurrent(classes: Iterable[type[MixingLayer]]) -> bool:
    return all(issubclass(kind, RecurrentLayer) for kind in classes)


def _classes(config: PolicyConfig) -> list[type[MixingLayer]]:
    return [ATTENTION_KINDS[kind] for kind in dict.fromkeys(config.layer_types or ())]


def _check_layer_types(config: PolicyConfig) -> None:
    layers = config.layer_types or []
    require(
        len(layers) == config.num_hidden_layers,
        f"layer_types has {len(layers)} entries, and must have one for each of the {config.num_hidden_layers} layers",
    )
    wrong = sorted(set(layers) - ATTENTION_KINDS.keys())
    require(not wrong, f"layer_types holds {', '.join(wrong)}; each entry must be {' or '.join(ATTENTION_KINDS)}")
    window, windowed = config.sliding_window, any(kind.has_window for kind in _classes(config))
    names = " or ".join(name for name, kind in ATTENTION_KINDS.items() if kind.has_window)
    require(
        (window is not None) == windowed,
        f"sliding_window is {window}, and must be given exactly where layer_types holds {names}; "
        + ("give it" if windowed else "leave it out"),
    )
    require(window is None or window >= 1, f"sliding_window is {window}, and must be at least 1")


def _check_rotation(config: PolicyConfig) -> None:
    rope, rotated = config.rope_parameters, config.no_rope_layers
    assert rope is not None
    require(
        rope["rope_type"] in ROPE_TYPES,
        f"rope_type is {rope['rope_type']!r}, and must not depend on the batch; use one of {', '.join(ROPE_TYPES)}",
    )
    theta = rope.get("rope_theta")
    require(
        isinstance(theta, int | float) and theta > 0,
        f"rope_theta is {theta!r}, and must be a positive number; use 10000",
    )
    _check_scaling(rope)
    if rope["rope_type"] == "longrope":
        _check_longrope(config)
    if rotated is None:
        return
    count = config.num_hidden_layers
    require(
        len(rotated) == count and all(value in (0, 1) for value in rotated),
        f"no_rope_layers is {rotated}, and must hold a number for each of the {count} layers: 1 to rotate by "
        "positions, 0 for none",
    )


def _check_scaling(rope: dict[str, Any]) -> None:
    """Require the options of a rotation that is scaled for longer sequences."""
    needed = _SCALING_OPTIONS.get(rope["rope_type"], ())
    missing = [name for name in needed if rope.get(name) is None]
    require(
        not missing, f"rope_type is {rope['rope_type']}, and {' and '.join(missing)} must be given in rope_parameters"
    )
    for name in needed:
        is_list = name in ("short_factor", "long_factor")
        is_number = isinstance(rope[name], int | float) and rope[name] > 0
        require(is_list or is_number, f"{name} is {rope[name]!r} in rope_parameters, and must be a positive number")


def _check_longrope(config: PolicyConfig) -> None:
    rope = config.rope_parameters or {}
    limit, positions = rope["original_max_position_embeddings"], config.max_position_embeddings
    require(
        positions <= limit,
        f"max_position_embeddings is {positions}, and must be at most original_max_position_embeddings ({limit}) with "
        "rope_type longrope, whose factors for longer sequences would depend on the batch; use "
        f"max_position_embeddings: {limit}",
    )

"""Fields and steps that the translations of Hub configs in `families` share."""

from __future__ import annotations

from typing import Any

from alignlab.errors import ConfigError

Fields = dict[str, Any]


def require_value(hub: Any, name: str, *allowed: Any) -> None:
    """Raise unless a field of a Hub config has a value that our model can stand for, or is not there at all.

    Raises:
        ConfigError: with the field and its value.
    """
    value = getattr(hub, name, None)
    if value is not None and value not in allowed:
        raise ConfigError(
            f"{name} is {value}, and {hub.model_type} is computed here with {' or '.join(map(str, allowed))} alone"
        )


def whole_rotation(hub: Any, rope: Fields) -> Fields:
    """Return rope parameters of a family that rotates all of a head.

    Raises:
        ConfigError: they say that a part is rotated.
    """
    partial = rope.get("partial_rotary_factor", 1.0)
    if partial != 1:
        raise ConfigError(
            f"partial_rotary_factor is {partial}, and {hub.model_type} rotates all of a head; leave it out"
        )
    return dict(rope)


def balance_coef(hub: Any) -> float:
    """Return the weight of the balance loss, which a Hub model trains with only if it outputs its router logits."""
    return hub.router_aux_loss_coef if hub.output_router_logits else 0.0


def read_windows(hub: Any) -> Fields:
    """Return the kinds of layers that a Hub config lists, and their window, where a layer has one."""
    return {
        "layer_types": list(hub.layer_types),
        "sliding_window": hub.sliding_window if "sliding_attention" in hub.layer_types else None,
    }


def read_one_window(hub: Any) -> Fields:
    """Return the kinds of layers of a family in which all have a window, or none."""
    kind = "full_attention" if hub.sliding_window is None else "sliding_attention"
    return {"layer_types": [kind] * hub.num_hidden_layers, "sliding_window": hub.sliding_window}

"""Buffers of routers that belong to a training run rather than to the model: no checkpoint of a model needs them."""

from __future__ import annotations

_STATE = (".expert_load", ".group_load", ".noise_key")


def is_router_state(name: str) -> bool:
    """Return True if a tensor's name is that of a router's load, or of the key of its noise."""
    return name.endswith(_STATE)

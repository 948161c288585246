"""The router that a config names."""

from __future__ import annotations

from alignlab.models.config import PolicyConfig
from alignlab.models.routers.base_layer import BaseRouter
from alignlab.models.routers.expert_choice import ExpertChoiceRouter
from alignlab.models.routers.hashed import HashRouter
from alignlab.models.routers.noisy import NoisyTopKRouter
from alignlab.models.routers.reinforce import ReinforceRouter
from alignlab.models.routers.sinkhorn import SinkhornRouter
from alignlab.models.routers.topk import TopKRouter

ROUTERS: dict[str, type[TopKRouter]] = {
    "topk": TopKRouter, "noisy_topk": NoisyTopKRouter, "hash": HashRouter, "base": BaseRouter,
    "sinkhorn": SinkhornRouter, "expert_choice": ExpertChoiceRouter, "reinforce": ReinforceRouter,
}  # fmt: skip
"""Routers by `router_type`."""


def make_router(config: PolicyConfig) -> TopKRouter:
    """Return the router that `config.router_type` names."""
    return ROUTERS[config.router_type](config)

"""Layers that share their weights: one module is computed several times, each time as another layer with its own cache.

`shared_layers` names, for each layer, the block of weights that it computes with. Sharing in place repeats a block
before the next one follows, [0, 0, 1, 1] (MobileLLM: Liu et al. 2024, arXiv:2402.14905, Sec. 2.3); sharing across the
model repeats all of them, [0, 1, 0, 1], or one alone, [0, 0, 0, 0] (ALBERT: Lan et al. 2019, arXiv:1909.11942).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignlab.errors import ConfigError
from alignlab.models.config_rules import require

PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Fields with an entry for each layer, which must be alike in layers that share weights."""


def check_sharing(config: Any) -> None:
    """Raise unless the layers of a `PolicyConfig` can share their weights as it says.

    Raises:
        ConfigError: with the field, its value, and what to change.
    """
    blocks, count = config.shared_layers, config.num_hidden_layers
    if blocks is None:
        return
    require(
        len(blocks) == count and all(block >= 0 for block in blocks),
        f"shared_layers is {blocks}, and must hold a block of weights for each of the {count} layers, counted from 0; "
        f"use {[index // 2 for index in range(count)]} to share by pairs",
    )
    in_order = list(dict.fromkeys(blocks))
    numbers = {block: number for number, block in enumerate(in_order)}
    require(
        in_order == list(range(len(in_order))),
        f"shared_layers is {blocks}, and must number its blocks in the order in which they first appear; use "
        f"{[numbers[block] for block in blocks]}",
    )
    for name in PER_LAYER:
        values = getattr(config, name)
        if values is not None:
            _check_alike(name, values, blocks)
    routed = sorted({*config.sparse_layers, *config.routed_attention})
    shared = [index for index in routed if blocks.count(blocks[index]) > 1]
    require(
        not shared,
        f"shared_layers gives layer {shared[0] if shared else 0} the weights of another, and it has a router, whose "
        "choices are counted and balanced for one layer; give it a block of its own",
    )


def _check_alike(name: str, values: Sequence[Any], blocks: Sequence[int]) -> None:
    """Raise a ConfigError if layers that share weights have different values of a field with an entry for each layer.
    """
    for index, block in enumerate(blocks):
        first = blocks.index(block)
        require(
            values[index] == values[first],
            f"shared_layers gives layers {first} and {index} the same weights, and {name} is {values[first]} for one "
            f"and {values[index]} for the other; make them alike, or give them blocks of their own",
        )


def refuse_sharing(config: Any, *, what: str) -> None:
    """Raise if layers of a model share weights, where each must have its own.

    Args:
        what: what cannot be done, such as "a student is made of single layers".

    Raises:
        ConfigError: with the field.
    """
    blocks = getattr(config, "shared_layers", None)
    if blocks is not None:
        raise ConfigError(f"shared_layers is {blocks}, and {what}; use a model whose layers have weights of their own")

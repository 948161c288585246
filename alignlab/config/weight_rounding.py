"""Rounding of the weights that the embedded engine samples from; a training on such rollouts weights its loss."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from alignlab.config.base import Frozen, OnResume


class _RoundedWeights(Frozen):
    """Linear layers and experts rounded to the nearest integers, anew at each update, adapters merged in."""

    on_resume = OnResume.RECORDED
    exact: tuple[str, ...] = ("lm_head",)
    """Layers that stay as they are, by a part of their name, such as `down_proj` or `layers.0`. Embeddings, norms and
    routers are never rounded."""


class Int8Weights(_RoundedWeights):
    """Weights in 8 bits, with one scale an output; activations are not rounded with them."""

    type: Literal["int8"] = "int8"


class Int4Weights(_RoundedWeights):
    """Weights in 4 bits, with one scale a group of inputs; activations are not rounded with them."""

    type: Literal["int4"] = "int4"
    group: Literal[32, 64, 128, 256] = 32
    """Inputs that share a scale; must divide the inputs of each rounded layer."""


class Int8DynamicWeights(_RoundedWeights):
    """Weights in 8 bits with one scale an output, and activations in 8 bits with one scale a token."""

    type: Literal["int8_dynamic"] = "int8_dynamic"


RoundedWeights = Int8Weights | Int4Weights | Int8DynamicWeights


def _as_section(raw: Any) -> Any:
    """Return a rounding that is given by its name alone as a section."""
    return {"type": raw} if isinstance(raw, str) else raw


WeightRoundingSettings = Annotated[
    Annotated[RoundedWeights, Field(discriminator="type")] | None, BeforeValidator(_as_section)
]

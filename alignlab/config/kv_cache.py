"""What the embedded engine keeps of keys and values: all of it, or an approximation, which the trainer may replay."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from alignlab.config.base import Frozen, OnResume


class ExactCache(Frozen):
    """Keys and values as they are computed."""

    on_resume = OnResume.RECORDED
    type: Literal["exact"] = "exact"


class _ApproximateCache(Frozen):
    """A cache that keeps less than all: rollouts come from the approximated policy."""

    on_resume = OnResume.RECORDED
    replay: bool = True
    """Compute training and scoring with the same approximation, with gradients straight through, so that engine and
    trainer agree. false: the trainer computes exactly, and the gap needs a `mismatch.correction`."""


class Int8Cache(_ApproximateCache):
    """Keys and values in 8-bit integers, with one scale a token and head."""

    type: Literal["int8"] = "int8"


class FP8Cache(_ApproximateCache):
    """Keys and values in 8-bit floating numbers (e4m3), with one scale a token and head."""

    type: Literal["fp8"] = "fp8"


ApproximateCache = Int8Cache | FP8Cache
KVCacheSettings = Annotated[ExactCache | ApproximateCache, Field(discriminator="type")]

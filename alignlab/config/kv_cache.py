"""What the embedded engine keeps of keys and values: all of it, or an approximation, which the trainer may replay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from alignlab.config.base import Frozen, MayChange, OnResume
from alignlab.config.error_messages import BrokenRule
from alignlab.files.home_folder import with_home


class ExactCache(Frozen):
    """Keys and values as they are computed."""

    on_resume = OnResume.RECORDED
    type: Literal["exact"] = "exact"


class MmapCache(Frozen):
    """Keys and values as they are computed, in a file on a disk, of which only what is in use lies in memory: for a
    cache larger than that. On a CPU with Linux, by the Python step."""

    on_resume = OnResume.RECORDED
    type: Literal["mmap"] = "mmap"
    folder: MayChange[Path]
    """On the disk that is to hold it. The file has no name, and is gone with the process."""
    max_gib: MayChange[float | None] = Field(None, gt=0)
    """Size of the file, at most; default: half of what the disk has free."""
    resident_gib: MayChange[float] = Field(1.0, gt=0)
    """Of the file in the process's memory at one time, about."""

    @field_validator("folder", mode="after")
    @classmethod
    def _expand_home(cls, folder: Path) -> Path:
        return with_home(folder)


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


class Int4Cache(_ApproximateCache):
    """Old keys and values in 4-bit integers: keys by channel over groups of tokens, values by token (KIVI,
    arXiv:2402.02750). A token meets its own group and the `recent` ones before it exactly."""

    type: Literal["int4"] = "int4"
    group: int = Field(32, ge=2)
    """Tokens of a group, from position 0 on. A block of the cache holds whole groups."""
    recent: int = Field(1, ge=0)
    """Groups before a token's own that it meets exactly."""


class WindowCache(_ApproximateCache):
    """The first tokens of a sequence and the newest ones (StreamingLLM, arXiv:2309.17453), at their true positions.
    Layers with a window of their own keep that one."""

    type: Literal["window"] = "window"
    tokens: int = Field(ge=1)
    """Newest tokens, the present one included."""
    sinks: int = Field(4, ge=0)
    """First tokens of a sequence."""


class EvictCache(_ApproximateCache):
    """A budget of tokens for each sequence and kv head: the first ones, the recent ones, and those that the newest
    queries attend to most (H2O, arXiv:2306.14048; SnapKV, arXiv:2404.14469), at their true positions. The others are
    dropped at the end of the prompt, and then after every `interval` tokens. Layers with a window of their own keep
    that one."""

    type: Literal["evict"] = "evict"
    heavy: int = Field(256, ge=1)
    """Tokens that stay because they are attended to most."""
    recent: int = Field(32, ge=1)
    """Newest tokens, which stay."""
    sinks: int = Field(4, ge=0)
    """First tokens of a sequence, which stay."""
    interval: int | None = Field(32, ge=1)
    """Tokens after the prompt, or after the last time, until tokens are dropped again; null drops at the end of the
    prompt alone (SnapKV)."""
    observed: int = Field(32, ge=1)
    """Newest queries, by whose attention tokens stay."""
    accumulate: bool = True
    """What tokens received when tokens were dropped before counts too (H2O, exactly where `observed` is `interval`)."""


class TopKCache(_ApproximateCache):
    """All keys and values, of which each query of a head reads those with its largest scores (arXiv:2106.06899) and the
    most recent ones. Layers with a window of their own are exact. Saves reads of a kernel that skips, and no bytes."""

    type: Literal["top_k"] = "top_k"
    tokens: int = Field(64, ge=1)
    """Tokens with the largest scores, beside the recent ones."""
    recent: int = Field(4, ge=1)
    """Newest tokens, the present one included, which are always read."""


class ThresholdCache(_ApproximateCache):
    """All keys and values, of which each query of a head reads those with enough weight, and the most recent ones.
    Layers with a window of their own are exact. Saves reads of a kernel that skips, and no bytes."""

    type: Literal["threshold"] = "threshold"
    part: float | None = Field(None, gt=0, lt=1)
    """Read the tokens with at least this part of the row's largest weight."""
    mass: float | None = Field(None, gt=0, lt=1)
    """Read the fewest tokens that have this share of the row's weight together (Twilight, arXiv:2502.02770)."""
    recent: int = Field(4, ge=1)
    """Newest tokens, the present one included, which are always read."""

    @model_validator(mode="after")
    def _check_rule(self) -> Self:
        if (self.part is None) == (self.mass is None):
            given = None if self.part is None else self.part
            must = "be set without mass, or mass without part: one of them says which tokens are read"
            raise BrokenRule("part", given, must, "set part: 0.01, or mass: 0.95")
        return self


class LowRankCache(_ApproximateCache):
    """Keys, before their rotation, and values in the dimensions in which those of the first prompts are largest (Eigen
    Attention, arXiv:2408.05646; PALU, arXiv:2407.21118). The bases are measured once, when a run starts, and stay."""

    type: Literal["low_rank"] = "low_rank"
    rank: int | None = Field(None, ge=1)
    """Dimensions that are kept of each head, of keys and of values."""
    energy: float | None = Field(None, gt=0, le=1)
    """Keep the fewest dimensions that hold this share of the squares of keys, and of values, over all heads."""
    calibration_tokens: int = Field(4096, ge=1)
    """Tokens of the first prompts, on which the bases are measured."""

    @model_validator(mode="after")
    def _check_rule(self) -> Self:
        if (self.rank is None) == (self.energy is None):
            must = "be set without energy, or energy without rank: one of them says how many dimensions are kept"
            raise BrokenRule("rank", self.rank, must, "set rank: 64, or energy: 0.95")
        if self.rank is not None and self.rank > self.calibration_tokens:
            must = f"be at most calibration_tokens ({self.calibration_tokens}), on which the bases are measured"
            raise BrokenRule("rank", self.rank, must, "raise calibration_tokens")
        return self


ApproximateCache = (
    Int8Cache | FP8Cache | Int4Cache | WindowCache | EvictCache | TopKCache | ThresholdCache | LowRankCache
)
KVCacheSettings = Annotated[ExactCache | MmapCache | ApproximateCache, Field(discriminator="type")]

"""What the embedded engine keeps of keys and values: all of it, or an approximation, which the trainer may replay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from alignlab.config.base import Frozen, MayChange, OnResume
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


ApproximateCache = Int8Cache | FP8Cache | Int4Cache | WindowCache
KVCacheSettings = Annotated[ExactCache | MmapCache | ApproximateCache, Field(discriminator="type")]

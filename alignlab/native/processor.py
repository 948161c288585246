"""Instructions of this machine's processor that compiled kernels need."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

_CPU_INFO = Path("/proc/cpuinfo")
_VECTORS = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl")
NEEDED: dict[torch.dtype, tuple[str, ...]] = {torch.float32: _VECTORS, torch.bfloat16: (*_VECTORS, "avx512_bf16")}
"""Names of instruction sets, as Linux has them, by the dtype of the weights."""
INTEGER_PRODUCTS = "avx512_vnni"
"""The instruction set of kernels for rounded weights, which are left out of what is compiled where it lacks."""


@cache
def _facts() -> dict[str, str]:
    """Return what Linux says of the first processor; nothing on other systems."""
    text = _CPU_INFO.read_text() if _CPU_INFO.is_file() else ""
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


@cache
def processor_flags() -> frozenset[str]:
    """Return the instruction sets of the first processor, as Linux names them; none on other systems."""
    return frozenset(_facts().get("flags", "").split())


def has_fast_pairs() -> bool:
    """Return True if instructions that multiply pairs of bfloat16 are there, and not known to be slower than float32's.

    Intel's are: `vdpbf16ps` of 32 products takes two cycles, and `vfmadd` of 16 half a cycle (measured on a Xeon with
    AVX-512 BF16).
    """
    return "avx512_bf16" in processor_flags() and _facts().get("vendor_id") != "GenuineIntel"


def missing_flags(dtype: torch.dtype) -> list[str]:
    """Return the instruction sets that kernels of a dtype need and this processor lacks."""
    return [flag for flag in NEEDED[dtype] if flag not in processor_flags()]


def has_fast_bfloat16() -> bool:
    """Return True unless the processor is known to multiply matrices of float32 faster than those of bfloat16.

    Known are those of x86 that lack AMX and fast pairs: torch's products of bfloat16 take 1.8 times as long as those of
    float32 on a Xeon with AVX-512 BF16, and 4 to 10 times with oneDNN held to AVX-512 or AVX2 there (measured).
    """
    flags = processor_flags()
    return "avx2" not in flags or "amx_bf16" in flags or has_fast_pairs()

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
def processor_flags() -> frozenset[str]:
    """Return the instruction sets of the first processor, as Linux names them; none on other systems."""
    if not _CPU_INFO.is_file():
        return frozenset()
    for line in _CPU_INFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def missing_flags(dtype: torch.dtype) -> list[str]:
    """Return the instruction sets that kernels of a dtype need and this processor lacks."""
    return [flag for flag in NEEDED[dtype] if flag not in processor_flags()]

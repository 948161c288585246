"""A pytest plug-in that prepares a process for tensors on a pretended GPU: `python -m pytest -p tests.gpu.plugin`.

It loads `device_guard.cpp`, compiled once for each installed torch, before torch is imported. `-p` loads it before any
other plug-in imports torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("device_guard.cpp")


def compiler() -> str | None:
    """Return the path of a C++ compiler; None if the machine has none."""
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")  # does not import it
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def build_device_guard() -> Path:
    """Return the compiled library; compile it, in seconds, unless it was compiled for this torch and source before."""
    torch_folder = _torch_folder()
    version = (torch_folder / "version.py").read_bytes() + os.fsencode(torch_folder)
    digest = hashlib.sha256(SOURCE.read_bytes() + version).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"alignlab-device-guard-{os.getuid()}-{digest}.so"
    if not library.exists():
        path = compiler()
        assert path is not None, "a C++ compiler is needed"
        unfinished = library.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [
                path, "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch_folder}/include", str(SOURCE),
                "-o", str(unfinished), f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu",
            ],
            check=True,
        )
        unfinished.rename(library)
    return library


def _load_device_guard() -> None:
    assert "torch" not in sys.modules, "torch looks for its CUDA hooks when it is imported"
    library = build_device_guard()
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _without_inference_mode() -> None:
    """Make inference mode a mode without gradients: wrapper tensors cannot be made in the former."""
    import torch

    def inference_mode(mode: object = True) -> object:
        return torch.no_grad()(mode) if callable(mode) else torch.set_grad_enabled(not mode)

    torch.inference_mode = inference_mode


def _as_one_operation(*names: str) -> list[Any]:
    """Keep operations whole that a build without CUDA kernels would take apart, so that they compute as on the CPU."""
    import torch

    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a pretended GPU computes above this kernel")

    library = torch.library.Library("aten", "IMPL")
    for name in names:
        library.impl(name, unreachable, "CUDA")
    return [library]


if __name__ == "tests.gpu.plugin" and os.environ.get("ALIGNLAB_PRETENDED_GPU"):
    _load_device_guard()
    _without_inference_mode()
    LIBRARY = _as_one_operation("silu_backward")

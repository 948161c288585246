"""The device and the ranks of this process, from the machine and our config alone.

`accelerate launch` hands settings of its own to `Accelerator` through the environment. Those that would change how a
run computes are refused here: a run must say in its config what it does.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import PartialState

from alignlab.config.trainer import NumericsSettings
from alignlab.errors import ConfigError
from alignlab.loop.numerics import apply_numerics
from alignlab.loop.rank_watchdog import watch_ranks

_COLLECTIVE_EXTRA_S = 120.0
_OFF = ("", "no", "false", "0")
_LAUNCH = "start ranks by: bash launch/torchrun.sh N CONFIG"
_REFUSED = {
    "ACCELERATE_MIXED_PRECISION": "torch's autocast would round what the rollout engine computes exactly; the dtype of "
    f"a run is model.dtype: unset it, or answer 'no' in `accelerate config`, or {_LAUNCH}",
    "ACCELERATE_USE_DEEPSPEED": "accelerate would step the optimizer at each micro-batch; set "
    f"trainer.sharding.strategy to zero1, zero2 or zero3, and unset it, or {_LAUNCH}",
    "ACCELERATE_USE_FSDP": "where weights live is for the config to say; set trainer.sharding.strategy to fsdp2, and "
    f"unset it, or {_LAUNCH}",
    "ACCELERATE_USE_MEGATRON_LM": f"a run is data parallel alone; {_LAUNCH}",
    "ACCELERATE_USE_PARALLELISM_CONFIG": f"a run is data parallel alone; {_LAUNCH}",
    "ACCELERATE_DYNAMO_BACKEND": f"what is compiled is chosen by the model's code; unset it, or {_LAUNCH}",
    "ACCELERATE_TORCH_DEVICE": "a run takes the GPU of its rank; unset it, and choose GPUs by CUDA_VISIBLE_DEVICES",
}
"""Variables by which `accelerate` changes a run, with the reason and the fix."""


def make_accelerator(rank_timeout_s: float, numerics: NumericsSettings | None = None) -> Accelerator:
    """Return the ranks and the device of this process: a GPU where there is one, else the CPU. Several ranks are
    watched from here on; see `rank_watchdog`.

    Args:
        rank_timeout_s: limit on the wait for a rank that is alive and makes no progress.
        numerics: precision and order of what a GPU computes; see `apply_numerics`.

    Raises:
        ConfigError: the environment asks for what the config does not say, there are more ranks than GPUs, or the GPU
            or the machine lacks what the kernels need; see also `apply_numerics`.
    """
    device_type = prepared_device(numerics or NumericsSettings()).type
    # accelerate imports deepspeed where it is installed, and that would look for its device, and say so.
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    # The limit of collectives comes after the watchdog's: the watchdog can name the rank that is lost.
    limit = InitProcessGroupKwargs(timeout=timedelta(seconds=rank_timeout_s + _COLLECTIVE_EXTRA_S))
    # Gradients are held once, in DDP's buckets; buffers are equal on all ranks, which compute them from the same sums.
    parallel = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
    accelerator = Accelerator(cpu=device_type != "cuda", mixed_precision="no", kwargs_handlers=[limit, parallel])
    if accelerator.device.type == "cuda" and accelerator.device.index is None:
        _set_device(accelerator, torch.device("cuda", torch.cuda.current_device()))
    watch_ranks(accelerator.process_index, accelerator.num_processes, rank_timeout_s)
    return accelerator


def prepared_device(numerics: NumericsSettings) -> torch.device:
    """Return the device of this rank, on which a model may be put before the ranks have met.

    Raises:
        ConfigError: see `make_accelerator`.
    """
    _check_environment()
    apply_numerics(numerics)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    _check_ranks(torch.cuda.device_count())
    _check_kernels(torch.cuda.get_device_capability())
    rank = os.environ.get("LOCAL_RANK")
    return torch.device("cuda", torch.cuda.current_device() if rank is None else int(rank))


def make_rank_group() -> torch.distributed.ProcessGroup | None:
    """Return a second process group of all ranks, for the collectives of another thread than training's; None for a
    single rank."""
    if not torch.distributed.is_initialized():
        return None
    group: torch.distributed.ProcessGroup = torch.distributed.new_group(backend="gloo")
    return group


def _check_environment() -> None:
    for name, reason in _REFUSED.items():
        value = os.environ.get(name, "")
        if value.lower() not in _OFF:
            raise ConfigError(f"the environment has {name}={value}, which a run does not take over: {reason}")


def _num_local_ranks() -> int:
    """Return the number of ranks that a launcher has started on this machine."""
    rank = os.environ.get("LOCAL_RANK")  # without it LOCAL_WORLD_SIZE is vLLM's, which sets it on a CPU
    return 1 if rank is None else int(os.environ.get("LOCAL_WORLD_SIZE") or int(rank) + 1)


def _check_ranks(num_gpus: int) -> None:
    """Raise if two ranks of this machine would share a GPU, on which NCCL fails with an obscure error."""
    num_ranks = _num_local_ranks()
    if num_ranks > num_gpus:
        raise ConfigError(
            f"this machine has {num_ranks} ranks, and needs a GPU for each, of which it shows {num_gpus}; start at "
            f"most {num_gpus} (bash launch/torchrun.sh {num_gpus} CONFIG), or set CUDA_VISIBLE_DEVICES= to train on "
            "the CPU"
        )


def _check_kernels(capability: tuple[int, int]) -> None:
    """Raise if the attention kernels cannot be compiled or run here, before a model is loaded for them.

    Args:
        capability: of the GPU, such as (9, 0).
    """
    name = torch.cuda.get_device_name()
    if capability < (8, 0):
        raise ConfigError(
            f"{name} has compute capability {capability[0]}.{capability[1]}, and packed attention in bfloat16 needs "
            "8.0 (A100 and later); use another GPU, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    if os.environ.get("CC") is None and not any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang")):
        raise ConfigError(
            "Triton, which compiles the GPU's kernels, needs a C compiler, and there is no cc, gcc or clang; install "
            "one (Debian and Ubuntu: build-essential), or name it in CC"
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise ConfigError(
            f"Triton, which compiles the GPU's kernels, needs Python's headers, and there is no {header}; install them "
            "(Debian and Ubuntu: python3-dev of this Python's version)"
        )


def _set_device(accelerator: Accelerator, device: torch.device) -> None:
    """Give the device its index: "cuda" and "cuda:0" are unequal, though they are one device."""
    accelerator.state.device = device
    PartialState().device = device

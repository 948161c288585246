"""Start the vLLM servers of a run from the run's config, and keep them running until Ctrl-C.

A config with `rollout: {engine: vllm_server}` lists its servers in `trainer.rollout.servers`. By default all of them
start on this machine, the first on the first GPU of CUDA_VISIBLE_DEVICES (or on the first `tensor_parallel` of them),
and so on. Then run `alignlab train` with the same config and the same key=value overrides: model, dtype and sizes must
be the same. With several machines, run this command on each with --only, and give all of them the same token in
ALIGNLAB_SERVER_TOKEN.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignlab.cli.train import add_config_arguments
from alignlab.errors import ConfigError

if TYPE_CHECKING:
    from alignlab.config.rollout import VLLMServerSettings
    from alignlab.config.run import RunConfig

NAME = "serve"
SUMMARY = "start the vLLM servers of a run's config"
EXAMPLE = "alignlab serve configs/grpo_smollm2_vllm_server.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_config_arguments(parser)
    parser.add_argument(
        "--only", metavar="ADDRESS", action="append", help="one of trainer.rollout.servers to start here; repeatable"
    )


def run(args: argparse.Namespace) -> int:
    """Serve until a signal arrives."""
    from alignlab.config.loader import load_config
    from alignlab.rollout.vllm.installation import MODEL_RUNNER_VARIABLE, model_runner, require_vllm

    config = load_config(args.config, args.overrides)
    settings = server_settings(config)
    addresses = chosen(settings, args.only)
    require_vllm(settings.engine)

    from alignlab.rollout.vllm.launch import keep_running, make_server
    from alignlab.rollout.vllm.options import check_quantization, check_served_cache

    check_quantization(settings)
    check_served_cache(settings)

    gpus = visible_gpus()
    plan = plan_servers(gpus, len(addresses), settings)
    settings = settings.model_copy(update={"memory_frac": plan.memory_frac})
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="alignlab-served-") as folder:
        options = write_served(config, settings, Path(folder))
        servers = [
            make_server(address, Path(folder), options, devices=devices, num_threads=plan.num_threads)
            for address, devices in zip(addresses, plan.devices, strict=True)
        ]
        tell(f"starting {len(servers)} vLLM server{'s' if len(servers) > 1 else ''} (half a minute); Ctrl-C ends")
        tell(f"vLLM's model runner: V{model_runner(servers[0].environment[MODEL_RUNNER_VARIABLE])}")
        if gpus:
            tell(training_advice(plan))
        keep_running(servers, tell)
    return 0


def tell(text: str) -> None:
    """Print a line on standard error."""
    print(f"alignlab serve: {text}", file=sys.stderr, flush=True)


def server_settings(config: RunConfig) -> VLLMServerSettings:
    """Return the settings of the config's servers.

    Raises:
        ConfigError: the config has none.
    """
    from alignlab.config.rollout import VLLMServerSettings

    rollout = config.online_stage.rollout if config.online_stage else None
    if not isinstance(rollout, VLLMServerSettings):
        engine = "missing" if rollout is None else rollout.engine
        raise ConfigError(
            f"trainer.rollout.engine is {engine}, and must be vllm_server for servers to be used; "
            "add trainer.rollout.engine=vllm_server"
        )
    return rollout


def chosen(settings: VLLMServerSettings, only: list[str] | None) -> list[str]:
    """Return the addresses to serve at.

    Raises:
        ConfigError: --only names an address that the config does not.
    """
    unknown = [address for address in only or () if address not in settings.servers]
    if unknown:
        raise ConfigError(
            f"--only is {unknown[0]}, and must be one of trainer.rollout.servers: {', '.join(settings.servers)}"
        )
    return only or list(settings.servers)


def visible_gpus() -> list[str]:
    """Return the GPUs of this machine that CUDA_VISIBLE_DEVICES leaves in view; none on a machine without one."""
    import torch

    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


@dataclass(frozen=True)
class ServerPlan:
    """Share of each server in this machine.

    Attributes:
        devices: value of CUDA_VISIBLE_DEVICES of each server; None for each on a machine without a GPU.
        memory_frac: fraction of a GPU's memory for each server on it.
        free_gpus: GPUs that no server takes.
        num_threads: threads of each process of a server.
    """

    devices: Sequence[str | None]
    memory_frac: float
    free_gpus: Sequence[str]
    num_threads: int


def plan_servers(gpus: Sequence[str], num_servers: int, settings: VLLMServerSettings) -> ServerPlan:
    """Share this machine out to its servers: a GPU each, or `tensor_parallel` GPUs, the first ones.

    Servers share GPUs if there are fewer, and the memory is for them and, if no GPU is left, for a training too.

    Args:
        gpus: in view.

    Raises:
        ConfigError: a server needs more GPUs than there are.
    """
    from alignlab.cpu_threads import available_cores
    from alignlab.rollout.vllm.options import MEMORY_FRAC, require_gpus

    size = settings.tensor_parallel
    num_threads = max(1, int(available_cores() / 2) // (num_servers * size))  # the other half is for the training
    if not gpus:
        return ServerPlan([None] * num_servers, settings.memory_frac or MEMORY_FRAC, [], num_threads)
    require_gpus(size, len(gpus))
    num_places = len(gpus) // size
    devices = [",".join(gpus[place % num_places * size :][:size]) for place in range(num_servers)]
    free = gpus[min(num_servers, num_places) * size :]
    num_sharing = -(-num_servers // num_places) + (not free)
    return ServerPlan(devices, settings.memory_frac or MEMORY_FRAC / num_sharing, free, num_threads)


def training_advice(plan: ServerPlan) -> str:
    """Return where to train beside servers on GPUs, of which a training would take the first, as servers do."""
    free = plan.free_gpus
    if len(free) > 1:
        return f"train on the other GPUs: bash launch/torchrun.sh --gpus {','.join(free)} {len(free)} CONFIG"
    if free:
        return f"train on the other GPU: CUDA_VISIBLE_DEVICES={free[0]} alignlab train CONFIG"
    return (
        f"no GPU is left for a training, and a server takes {plan.memory_frac:.0%} of its GPU's memory; "
        "trainer.rollout.memory_frac=0.45 leaves half to a training on it, 0.9 is for a training elsewhere"
    )


def write_served(config: RunConfig, settings: VLLMServerSettings, folder: Path) -> dict[str, Any]:
    """Write the model that the run starts from, which the first update replaces, and return vLLM's options."""
    import torch
    from accelerate.utils import set_seed

    from alignlab.loop.numerics import VLLM_PRECISION, matmul_precision
    from alignlab.models.adapters import add_lora
    from alignlab.models.decoder import causal_lm
    from alignlab.models.hub.export import write_base
    from alignlab.rollout.vllm.options import checked_adapter_rank, engine_options, sync_adapter_only
    from alignlab.starting_model import make_model, make_tokenizer, model_dtype

    tokenizer = make_tokenizer(config)
    set_seed(config.trainer.seed)
    os.environ[VLLM_PRECISION] = matmul_precision(config.trainer.numerics)  # the servers' environment
    model = make_model(config.model, tokenizer, model_dtype(config.model))
    write_base(model, folder)
    tokenizer.save_pretrained(folder)
    on_cpu = not torch.cuda.is_available()
    policy = model if config.model.lora is None else add_lora(causal_lm(model), config.model.lora)
    adapter_rank = checked_adapter_rank(policy) if sync_adapter_only(settings, policy, on_cpu=on_cpu) else 0
    return engine_options(settings, policy, adapter_rank=adapter_rank, on_cpu=on_cpu)

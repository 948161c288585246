"""Start the vLLM servers of a run, from the run's own config, and keep them running until Ctrl-C.

A config with `rollout: {engine: vllm_server}` names them in `trainer.rollout.servers`; by default all are started
here, the first on the first GPU of CUDA_VISIBLE_DEVICES, and so on. Start them, then `alignlab train` with the same
config and the same key=value: model, dtype and sizes must be alike. On several machines, run this on each with --only,
and give all of them one token in ALIGNLAB_SERVER_TOKEN.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignlab.cli.train import add_config_arguments
from alignlab.errors import ConfigError

if TYPE_CHECKING:
    from alignlab.config.rollout import VLLMServerSettings
    from alignlab.config.run import RunConfig

NAME = "serve"
SUMMARY = "start the vLLM servers that a run's config names"
EXAMPLE = "alignlab serve configs/grpo_smollm2_vllm_server.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_config_arguments(parser)
    parser.add_argument("--only", metavar="ADDRESS", action="append", help="of trainer.rollout.servers; repeatable")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal."""
    from alignlab.config.loader import load_config
    from alignlab.rollout.vllm.requirement import require_vllm

    config = load_config(args.config, args.overrides)
    settings = server_settings(config)
    addresses = chosen(settings, args.only)
    require_vllm(settings.engine)

    from alignlab.rollout.vllm.server.process import keep_running, make_server

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="alignlab-served-") as folder:
        options = write_served(config, settings, Path(folder))
        devices = devices_of(len(addresses))
        servers = [
            make_server(address, Path(folder), options, device=device)
            for address, device in zip(addresses, devices, strict=True)
        ]
        tell(f"starting {len(servers)} vLLM server{'s' if len(servers) > 1 else ''} (half a minute); Ctrl-C ends")
        keep_running(servers, tell)
    return 0


def tell(text: str) -> None:
    """One line on standard error."""
    print(f"alignlab serve: {text}", file=sys.stderr, flush=True)


def server_settings(config: RunConfig) -> VLLMServerSettings:
    """The config's servers.

    Raises:
        ConfigError: it has none.
    """
    from alignlab.config.rollout import VLLMServerSettings
    from alignlab.config.trainers import OnlineConfig, stages_of

    last = stages_of(config.trainer)[-1]
    rollout = last.rollout if isinstance(last, OnlineConfig) else None
    if not isinstance(rollout, VLLMServerSettings):
        found = "missing" if rollout is None else rollout.engine
        raise ConfigError(
            f"trainer.rollout.engine is {found}, and must be vllm_server for servers to be used; "
            "add trainer.rollout.engine=vllm_server"
        )
    return rollout


def chosen(settings: VLLMServerSettings, only: list[str] | None) -> list[str]:
    """The addresses to serve at.

    Raises:
        ConfigError: --only names one that the config does not.
    """
    unknown = [address for address in only or () if address not in settings.servers]
    if unknown:
        raise ConfigError(
            f"--only is {unknown[0]}, and must be one of trainer.rollout.servers: {', '.join(settings.servers)}"
        )
    return only or list(settings.servers)


def devices_of(count: int) -> list[str | None]:
    """The GPU of each server, where there is one for each."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
    return list(visible[:count]) if len(visible) >= count and torch.cuda.is_available() else [None] * count


def write_served(config: RunConfig, settings: VLLMServerSettings, folder: Path) -> dict[str, Any]:
    """Write the model that the run starts from, which the first update replaces; returns vLLM's options."""
    import torch
    from accelerate.utils import set_seed

    from alignlab.models.adapters import add_lora
    from alignlab.models.attention import causal_lm
    from alignlab.models.export import write_base
    from alignlab.rollout.vllm.options import (
        adapter_options,
        check_adapter,
        engine_options,
        merged_options,
        travels_alone,
    )
    from alignlab.trainers.run import make_model, make_tokenizer, model_dtype

    tokenizer = make_tokenizer(config)
    set_seed(config.trainer.seed)
    model = make_model(config.model, tokenizer, model_dtype(config.model))
    write_base(model, folder)
    tokenizer.save_pretrained(folder)
    lm: Any = causal_lm(model)
    positions = lm.config.get_text_config().max_position_embeddings
    on_cpu = not torch.cuda.is_available()
    options = engine_options(
        settings,
        dtype=lm.dtype,
        context_tokens=min(positions, settings.context_tokens or positions),
        on_cpu=on_cpu,
        sparse=bool(getattr(lm.config, "sparse_layers", ())),
    )
    policy = model if config.model.lora is None else add_lora(lm, config.model.lora)
    if travels_alone(settings, policy, on_cpu=on_cpu):
        return options | adapter_options(check_adapter(policy), num_versions=settings.max_staleness + 1)
    return options | merged_options()

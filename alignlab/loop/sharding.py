"""The choice of where the weights in training live: by the config, the number of ranks, and the weights' dtype."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh

from alignlab.config.trainer import ShardingSettings
from alignlab.errors import ConfigError
from alignlab.loop.fully_sharded import FullySharded
from alignlab.loop.master_weights import MasterAdamW
from alignlab.loop.ranks import Ranks
from alignlab.loop.strategy import DataParallel, GradientSum, SingleProcess, Strategy
from alignlab.models.empty import is_empty
from alignlab.models.policy import PackedModel
from alignlab.models.shards import shard, shard_root


def check_sharding(settings: ShardingSettings, num_ranks: int) -> None:
    """Raise if there are too few ranks to spread weights over.

    Raises:
        ConfigError: there is one.
    """
    if settings.strategy == "fsdp2" and num_ranks == 1:
        raise ConfigError(
            "trainer.sharding.strategy is fsdp2, which spreads weights over ranks, and this run has one rank; start "
            "several (bash launch/torchrun.sh N CONFIG), or set it to ddp"
        )


def shard_weights(module: PackedModel, settings: ShardingSettings, ranks: Ranks) -> None:
    """Spread the weights of a module's model over the ranks, where the settings say so; before its optimizer is made.

    Raises:
        ConfigError: there is one rank, or weights in 16 bits train beside others.
    """
    if settings.strategy != "fsdp2" or is_empty(module):
        return
    check_sharding(settings, ranks.count)
    shard(module.model, init_device_mesh(ranks.device.type, (ranks.count,)))


def make_strategy(module: PackedModel, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> Strategy:
    """Return the strategy that fits the number of ranks; a module is put on the accelerator's device by its maker.

    A module without weights, of which nothing can be exchanged, is one process's.
    """
    if accelerator.num_processes == 1 or is_empty(module):
        return SingleProcess(module, optimizer)
    if shard_root(module.model) is not None:
        return FullySharded(module, optimizer, Ranks(accelerator))
    if isinstance(optimizer, MasterAdamW):
        return GradientSum(module, optimizer, Ranks(accelerator))
    return DataParallel(module, optimizer, accelerator)

"""The choice of where the weights in training live: by the config, the number of ranks, and the weights' dtype."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh

from alignlab.config.trainer import ShardingSettings, TrainerConfig
from alignlab.errors import ConfigError
from alignlab.loop.fully_sharded import FullySharded
from alignlab.loop.master_weights import MasterAdamW
from alignlab.loop.ranks import Ranks
from alignlab.loop.strategy import DataParallel, GradientSum, SingleProcess, Strategy
from alignlab.loop.zero.engine_config import engine_config
from alignlab.loop.zero.installation import check_deepspeed
from alignlab.loop.zero.root import ZeroRoot
from alignlab.loop.zero.strategy import Zero
from alignlab.models.empty import is_empty
from alignlab.models.policy import PackedModel
from alignlab.models.shards import set_root, shard, shard_root
from alignlab.models.sync_digests import sync_digests


def check_sharding(settings: ShardingSettings, num_ranks: int) -> None:
    """Raise if a strategy does not fit the number of ranks.

    Raises:
        ConfigError: one rank would share with none, or several ranks would train for themselves.
    """
    strategy = settings.strategy
    if settings.spreads_training and num_ranks == 1:
        raise ConfigError(
            f"trainer.sharding.strategy is {strategy}, which shares a training out over ranks, and this run has one "
            "rank; start several (bash launch/torchrun.sh N CONFIG), or set it to ddp"
        )
    if strategy == "none" and num_ranks > 1:
        raise ConfigError(
            f"trainer.sharding.strategy is none, which is one process, and this run has {num_ranks} ranks, which would "
            "train for themselves; set it to ddp, fsdp2, zero1, zero2 or zero3, or start one process"
        )


def shard_weights(module: PackedModel, config: TrainerConfig, ranks: Ranks) -> None:
    """Spread the training of a module's model over the ranks, where the config says so; before its optimizer is made.

    Raises:
        ConfigError: see `check_sharding`; DeepSpeed is missing or of an untested version; a user's DeepSpeed file
            cannot be read, or contradicts the config; or weights in 16 bits train beside others.
    """
    settings, max_grad_norm = config.sharding, config.optim.max_grad_norm
    if settings.zero_stage:
        check_deepspeed()
        engine_config(settings, max_grad_norm=max_grad_norm, largest=1)
        _check_one_dtype(module, settings)
    if is_empty(module):
        return
    check_sharding(settings, ranks.count)
    if not settings.spreads_training:
        return
    if shard_root(module.model) is None:  # another role may have spread it
        mesh = init_device_mesh(ranks.device.type, (ranks.count,))
        if settings.zero_stage == 0:
            check_equal(module, ranks)
            shard(module.model, mesh)
        else:
            set_root(module.model, ZeroRoot(module.model, settings, mesh, max_grad_norm))
    tensors = (*module.parameters(), *module.buffers())
    if settings.spreads_weights and any(tensor.device.type != ranks.device.type for tensor in tensors):
        module.to(ranks.device)  # a head, or a buffer, that was loaded on the host beside the weights


def _check_one_dtype(module: PackedModel, settings: ShardingSettings) -> None:
    """Raise if what trains has several dtypes, which one engine of DeepSpeed would round to one.

    Raises:
        ConfigError: with the dtypes.
    """
    dtypes = {parameter.dtype for parameter in module.parameters() if parameter.requires_grad}
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ConfigError(
            f"trainer.sharding.strategy is {settings.strategy}, by which all that trains must have one dtype, and this "
            f"trains {names}, as a head in float32 on a model in 16 bits does; set model.dtype: float32, or "
            "trainer.sharding.strategy: fsdp2"
        )


def check_equal(module: PackedModel, ranks: Ranks) -> None:
    """Raise if the ranks' weights in training differ, of which each would go on with some rows.

    Raises:
        ConfigError: with the name of a weight.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    digests = sync_digests(trained)
    for of_rank in ranks.gather_json(digests):
        differing = [name for name, digest in digests.items() if of_rank.get(name) != digest]
        if differing:
            raise ConfigError(
                f"the ranks begin with unequal weights, first {differing[0]} ({len(differing)} in all), and "
                "trainer.sharding.strategy is fsdp2, which takes some rows of each; set the same seed on every rank "
                "before the model is made"
            )


def make_strategy(module: PackedModel, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> Strategy:
    """Return the strategy that fits the number of ranks; a module is put on the accelerator's device by its maker.

    A module without weights, of which nothing can be exchanged, is one process's.
    """
    if accelerator.num_processes == 1 or is_empty(module):
        return SingleProcess(module, optimizer)
    root = shard_root(module.model)
    if isinstance(root, ZeroRoot):
        return Zero(module, optimizer, root, Ranks(accelerator))
    if root is not None:
        return FullySharded(module, optimizer, Ranks(accelerator))
    if isinstance(optimizer, MasterAdamW):
        return GradientSum(module, optimizer, Ranks(accelerator))
    return DataParallel(module, optimizer, accelerator)

"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from alignlab.config.trainers import TrainerConfig
from alignlab.errors import ConfigError
from alignlab.loop.kept_zeros import keep_zeros
from alignlab.loop.master_weights import MasterAdamW, needs_master
from alignlab.loop.weight_decay import weight_kinds

logger = logging.getLogger(__name__)
FUSED_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})


def make_optimizer(model: nn.Module, config: TrainerConfig) -> torch.optim.AdamW:
    """Return AdamW (arXiv:1711.05101) over the parameters of `model` that require a gradient.

    Those in 16 bits have float32 copies, see `master_weights`.

    Weight decay applies to the kinds of weights in `optim.weight_decay_on`, see `weight_decay`. The fused kernel is
    used where every parameter is on a device that has one.

    Raises:
        ConfigError: nothing is trainable, or see `keep_zeros`.
    """
    kinds, settings = weight_kinds(model), config.optim
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError(
            "training needs at least one parameter with requires_grad, and the model has 0; "
            "set model.lora, or unfreeze the weights to be trained"
        )
    if settings.keep_zeros:
        keep_zeros(model, [parameter for parameter in trained if kinds[parameter] == "matrices"])
    by_kind: dict[tuple[bool, bool, torch.dtype], list[nn.Parameter]] = {}
    for parameter in trained:
        # One kernel does not take tensors of which this rank holds a part together with whole ones, nor two dtypes.
        decays = kinds[parameter] in settings.weight_decay_on
        kind = (decays, isinstance(parameter, DTensor), parameter.dtype)
        by_kind.setdefault(kind, []).append(parameter)
    has_copies = config.sharding.zero_stage > 0  # DeepSpeed's, in float32, which the optimizer gets to step
    make = MasterAdamW if any(map(needs_master, trained)) and not has_copies else torch.optim.AdamW
    optimizer = make(
        [
            {"params": parameters, "weight_decay": settings.weight_decay if decays else 0.0}
            for (decays, *_), parameters in by_kind.items()
        ],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        fused=all(parameter.device.type in FUSED_DEVICES for parameter in trained),
    )
    optimizer.register_step_post_hook(_mark_written)
    return optimizer


def _mark_written(optimizer: torch.optim.Optimizer, args: Any, options: Any) -> None:
    """Raise the version of each weight that a step has changed, by which copies of it are known to be old.

    The fused kernel writes to weights without this mark.
    """
    written = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    torch.autograd.graph.increment_version(written)


def learning_rate_factor(update: int, *, schedule: str, warmup: int, total: int) -> float:
    """Return the factor on the learning rate at an update, counted from 0.

        warm-up:  (update + 1) / (warmup + 1), so that the first update already moves
        linear:   1 - x,  cosine:  (1 + cos(pi x)) / 2,  with x = (update - warmup) / (total - warmup)

    Past the last update, x stays 1.
    """
    if update < warmup:
        return (update + 1) / (warmup + 1)
    progress = min((update - warmup) / (total - warmup), 1.0)
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    assert schedule == "constant", schedule
    return 1.0


def make_schedule(
    optimizer: torch.optim.Optimizer, config: TrainerConfig, total_updates: int, updates_per_step: int
) -> LambdaLR:
    """Return the schedule of a run of `total_updates` optimizer updates; step it once after each.

    `config.optim.warmup_steps` counts steps of the run, each of `updates_per_step` updates.
    """
    warmup = config.optim.warmup_steps * updates_per_step

    def factor(update: int) -> float:
        return learning_rate_factor(update, schedule=config.optim.schedule, warmup=warmup, total=total_updates)

    return LambdaLR(optimizer, factor)


def schedule_state(schedule: LambdaLR) -> dict[str, Any]:
    """Return the position of the schedule and its learning rates, as JSON."""
    return {"update": schedule.last_epoch, "learning_rates": [float(rate) for rate in schedule.get_last_lr()]}


def load_schedule_state(schedule: LambdaLR, state: dict[str, Any]) -> None:
    """Go on at the update of a `schedule_state`, with the learning rates that this schedule has there.

    A run that goes on with more steps, or another learning rate, schedule or warm-up, follows the new settings from its
    first update on, and logs a warning that the rate differs.
    """
    schedule.last_epoch = state["update"]
    rates = [
        base * factor(schedule.last_epoch)
        for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    schedule._last_lr = list(rates)
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    if rates[0] != state["learning_rates"][0]:  # all groups have one rate
        logger.warning(
            "the run goes on after update %d at learning rate %g; the settings that it was saved under would have "
            "given %g", state["update"], rates[0], state["learning_rates"][0],
        )  # fmt: skip

"""Turning what a user passes to a trainer (names, paths, live objects) into what the loops work with."""

from __future__ import annotations

import copy
import logging
import numbers
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignlab.config.model import LoraSettings
from alignlab.config.rewards import RewardSettings
from alignlab.errors import ConfigError
from alignlab.models.adapter_rules import check_base_is_reference, check_trainable
from alignlab.models.adapters import add_lora, has_adapters
from alignlab.models.checkpoints import load_model, load_tokenizer
from alignlab.models.policy import Policy
from alignlab.trainers.rank_watchdog import watch_ranks
from alignlab.training.reward_functions import LoadedReward, load_reward, load_weighted

logger = logging.getLogger(__name__)
Model = str | Path | PreTrainedModel | PeftModel
Reward = str | RewardSettings | Callable[..., Any] | tuple[str | Callable[..., Any], float]
Rewards = Reward | Sequence[Reward]
_LATER_S = 120.0


def make_accelerator(rank_timeout_s: float) -> Accelerator:
    """The ranks and the device of this process: a GPU where there is one, else the CPU. Several ranks are watched from
    here on; see `rank_watchdog`.

    Args:
        rank_timeout_s: how long ranks wait for one that is alive and does not get on.
    """
    # The libraries' own limit comes after the watchdog's, which can tell which rank it is.
    limit = InitProcessGroupKwargs(timeout=timedelta(seconds=rank_timeout_s + _LATER_S))
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[limit])
    watch_ranks(accelerator.process_index, accelerator.num_processes, rank_timeout_s)
    return accelerator


def make_rank_group() -> torch.distributed.ProcessGroup | None:
    """A group of all ranks of its own, for messages from another thread than the training's; None for one rank."""
    if not torch.distributed.is_initialized():
        return None
    group: torch.distributed.ProcessGroup = torch.distributed.new_group(backend="gloo")
    return group


def check_shares(name: str, count: int, ranks: int, num_minibatches: int = 1) -> None:
    """Every rank takes the same share of a step, and cuts it into equal mini-batches.

    Raises:
        ConfigError: it cannot be shared out evenly.
    """
    shares = ranks * num_minibatches
    if count % shares:
        below, above = count // shares * shares, (count // shares + 1) * shares
        parts = f" x num_minibatches ({num_minibatches}) = {shares}" if num_minibatches > 1 else ""
        raise ConfigError(
            f"{name} is {count}, and must be a multiple of the number of ranks ({ranks}){parts}; "
            f"use {f'{below} or ' if below else ''}{above}"
        )


def resolve_model(
    model: Model,
    tokenizer: str | PreTrainedTokenizerBase | None,
    peft_config: LoraSettings | LoraConfig | None,
    device: torch.device,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The model with its adapter, on `device`, and its tokenizer.

    A model given by name is loaded in bfloat16 under an adapter, in float32 where all weights train: bfloat16 weights
    would lose most of an optimizer's small updates.

    Raises:
        ConfigError: there is no tokenizer, all of a bfloat16 model's weights would be trained, or the adapter
            is no LoRA or cannot be trained, merged and saved exactly.
    """
    check_lora(peft_config)
    model, tokenizer = resolve_base(model, tokenizer, peft_config)
    if peft_config is not None:
        if isinstance(model, PeftModel):
            raise ConfigError("the model has an adapter already, and peft_config asks for another; leave one out")
        model = add_lora(model, peft_config)
    if isinstance(model, PeftModel):
        check_lora(model.peft_config[model.active_adapter])
    if isinstance(model, PeftModel) and not any(p.requires_grad for p in model.parameters()):
        model.set_adapter(model.active_adapter)  # as one loaded by name, to be trained further
    if isinstance(model, PeftModel):
        check_trainable(model)
    _check_trained_dtype(model)
    model.to(device)  # type: ignore[arg-type]  # transformers' stubs miss torch's signature
    return model, tokenizer


def resolve_base(
    model: Model, tokenizer: str | Path | PreTrainedTokenizerBase | None, peft_config: LoraSettings | LoraConfig | None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The model as it is given, or loaded by name in bfloat16 where an adapter will be put on it; and its tokenizer.

    An adapter that trains copies of whole modules is put on a float32 model: the copies have the model's dtype.

    Raises:
        ConfigError: there is no tokenizer.
    """
    model = str(model) if isinstance(model, Path) else model
    if not isinstance(model, str | PreTrainedModel | PeftModel):
        raise ConfigError(
            f"model must be a name, a path or a model of transformers or PEFT, and is {type(model).__name__}; give one "
            "of these"
        )
    tokenizer = _resolve_tokenizer(model, tokenizer)
    if isinstance(model, str):
        whole = peft_config is None or _trains_copies(peft_config)
        model = load_model(model, dtype=torch.float32 if whole else torch.bfloat16)
    return model, tokenizer


def _trains_copies(peft_config: LoraSettings | LoraConfig) -> bool:
    """Return whether an adapter trains copies of modules or rows of the embedding, which have the base's dtype."""
    names = ("modules_to_save", "trainable_token_indices")
    return any(getattr(peft_config, name, None) for name in names)


def check_lora(peft_config: object) -> None:
    """Refuse an adapter of another kind than LoRA.

    Raises:
        ConfigError: it is of another kind, or no description of an adapter.
    """
    if peft_config is None or type(peft_config) in (LoraSettings, LoraConfig):
        return
    kind = type(peft_config).__name__
    raise ConfigError(
        f"peft_config must be LoraSettings or PEFT's LoraConfig, and is {kind}; what is trained here is LoRA or all "
        "weights: use LoraSettings(rank=16), or leave it out to train all weights"
    )


def _resolve_tokenizer(
    model: str | PreTrainedModel | PeftModel, tokenizer: str | Path | PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        tokenizer = model if isinstance(model, str) else model.config.name_or_path or None
    if tokenizer is None:
        raise ConfigError("tokenizer is not given, and the model has no name to find it by; pass tokenizer=")
    if isinstance(tokenizer, str | Path):
        return load_tokenizer(str(tokenizer))
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(
            f"tokenizer must be a name, a path or a tokenizer of transformers, and is {type(tokenizer).__name__}; give "
            "one of these, of a processor its tokenizer"
        )
    return tokenizer


def _check_trained_dtype(model: PreTrainedModel | PeftModel) -> None:
    low = [n for n, p in model.named_parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if low:
        adapted = isinstance(model, PeftModel)
        instead = "take its module out of modules_to_save" if adapted else "train an adapter (lora)"
        raise ConfigError(
            f"{len(low)} weights would be trained in {model.dtype}, first {low[0]}, and an optimizer's small updates "
            f"are lost in its rounding; load the model in float32, or {instead}"
        )


def resolve_rewards(rewards: Rewards) -> list[LoadedReward]:
    """One reward function or several, each by name, settings, as a callable, or as a pair (name or callable, weight).

    Raises:
        ConfigError: there is none, or one cannot be found.
    """
    if isinstance(rewards, str | RewardSettings) or callable(rewards):
        rewards = [rewards]
    if not rewards:
        raise ConfigError("reward_funcs is empty; reinforcement learning needs at least one reward function")
    return [_resolve_reward(reward) for reward in rewards]


def _resolve_reward(reward: Any) -> LoadedReward:
    if isinstance(reward, tuple) and len(reward) == 2:
        return load_weighted(*reward)
    if isinstance(reward, numbers.Real):
        raise ConfigError(
            f"reward_funcs holds the number {reward}, which is no reward; a weight stands in a pair with its reward: "
            "reward_funcs=[(my_reward, 0.5)]"
        )
    return load_reward(RewardSettings(name=reward) if isinstance(reward, str) else reward)


def make_reference(policy: Policy) -> Policy | None:
    """A frozen copy of the policy; None for an adapter, whose reference is the base with the adapter off.

    Raises:
        ConfigError: the adapter was made by changing the base.
    """
    if has_adapters(policy.model):
        check_base_is_reference(policy.model)
        if any("lora_B" in name and bool(p.any()) for name, p in policy.named_parameters()):
            logger.warning(
                "the adapter is not a new one: the reference is the base without it, and not the policy that the "
                "training starts from; to change that, merge the adapter (alignlab merge) and train from the result"
            )
        return None
    return copy.deepcopy(policy).requires_grad_(False).eval()

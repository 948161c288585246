"""Models, tokenizers and rewards as a user passes them to a trainer (names, paths, objects), loaded and checked."""

from __future__ import annotations

import logging
import numbers
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignlab.config.model import LoraSettings
from alignlab.config.rewards import RewardSettings
from alignlab.errors import ConfigError
from alignlab.models.adapter_rules import check_trainable
from alignlab.models.adapters import add_lora
from alignlab.models.decoder import causal_lm
from alignlab.models.empty import put_on
from alignlab.models.hub.checkpoints import load_model, load_tokenizer
from alignlab.scoring.loading import LoadedReward, load_reward, load_weighted

logger = logging.getLogger(__name__)
Model = str | Path | PreTrainedModel | PeftModel
Reward = str | RewardSettings | Callable[..., Any] | tuple[str | Callable[..., Any], float]
Rewards = Reward | Sequence[Reward]


def check_shares(name: str, count: int, ranks: int, num_minibatches: int = 1) -> None:
    """Raise if a step cannot be shared out evenly: every rank takes the same share, cut into equal mini-batches.

    Raises:
        ConfigError: with the nearest counts that can.
    """
    shares = ranks * num_minibatches
    if count % shares:
        below, above = count // shares * shares, (count // shares + 1) * shares
        factor = f" x num_minibatches ({num_minibatches}) = {shares}" if num_minibatches > 1 else ""
        raise ConfigError(
            f"{name} is {count}, and must be a multiple of the number of ranks ({ranks}){factor}; "
            f"use {f'{below} or ' if below else ''}{above}"
        )


def resolve_model(
    model: Model,
    tokenizer: str | PreTrainedTokenizerBase | None,
    peft_config: LoraSettings | LoraConfig | None,
    device: torch.device,
    computes_on: torch.device | None = None,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Return the model with its adapter, on `device`, and its tokenizer.

    A model given by name is loaded in bfloat16 under an adapter, in float32 where all weights train.

    Args:
        computes_on: where the model will compute, if not on `device`.

    Raises:
        ConfigError: there is no tokenizer, or the adapter is no LoRA or cannot be trained, merged and saved exactly.
    """
    check_lora(peft_config)
    model, tokenizer = resolve_base(model, tokenizer, peft_config, device)
    if peft_config is not None:
        if isinstance(model, PeftModel):
            raise ConfigError("the model has an adapter already, and peft_config asks for another; leave one out")
        model = add_lora(model, peft_config)
    if isinstance(model, PeftModel):
        check_lora(model.peft_config[model.active_adapter])
    if isinstance(model, PeftModel) and not any(p.requires_grad for p in model.parameters()):
        model.set_adapter(model.active_adapter)  # PEFT loads an adapter frozen; here it is trained further
    if isinstance(model, PeftModel):
        check_trainable(model)
    _warn_of_slow_products(model, computes_on or device)
    put_on(model, device)
    return model, tokenizer


def resolve_base(
    model: Model, tokenizer: str | Path | PreTrainedTokenizerBase | None,
    peft_config: LoraSettings | LoraConfig | None, device: torch.device | str = "cpu",
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Return the model, loaded onto a device where it is given by name (in bfloat16 for a new adapter), and its
    tokenizer.

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
        in_float32 = peft_config is None or _trains_copies(peft_config)
        model = load_model(model, dtype=torch.float32 if in_float32 else torch.bfloat16, device=device)
    return model, tokenizer


def _trains_copies(peft_config: LoraSettings | LoraConfig) -> bool:
    """Return whether an adapter trains copies of modules or rows of the embedding, which have the base's dtype."""
    names = ("modules_to_save", "trainable_token_indices")
    return any(getattr(peft_config, name, None) for name in names)


def check_lora(peft_config: object) -> None:
    """Raise if an adapter is not LoRA.

    Raises:
        ConfigError: `peft_config` is of another kind of adapter, or none.
    """
    if peft_config is None or type(peft_config) in (LoraSettings, LoraConfig):
        return
    kind = type(peft_config).__name__
    raise ConfigError(
        f"peft_config must be LoraSettings or PEFT's LoraConfig, and is {kind}; alignlab trains LoRA or all weights: "
        "use LoraSettings(rank=16), or leave it out to train all weights"
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


def _warn_of_slow_products(model: PreTrainedModel | PeftModel, device: torch.device) -> None:
    """Warn where a GPU has no grouped kernel for a mixture in its dtype."""
    lm = causal_lm(model)
    if device.type == "cuda" and lm.dtype != torch.bfloat16 and bool(getattr(lm.config, "num_routers", 0)):
        logger.warning(
            "the model is a mixture of experts in %s, for which torch has no grouped kernel: a GPU computes a product "
            "for each expert, and the host waits for the experts' counts in each layer; bfloat16 has one (model.dtype)",
            str(lm.dtype).removeprefix("torch."),
        )


def resolve_rewards(rewards: Rewards) -> list[LoadedReward]:
    """Load one reward function or several, each a name, settings, a callable or a pair (name or callable, weight).

    Raises:
        ConfigError: there is no reward function, or one cannot be found.
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

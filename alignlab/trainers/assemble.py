"""Turning what a user passes to a trainer (names, paths, live objects) into what the loops work with."""

from __future__ import annotations

import copy
import logging
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignlab.config.data import DataSettings
from alignlab.config.model import LoraSettings
from alignlab.config.rewards import RewardSettings
from alignlab.data.examples import Example, examples_from_rows, load_examples
from alignlab.data.preferences import Preference, load_preferences, preferences_from_rows
from alignlab.data.prompts import PromptDataset, load_prompts, prompts_from_rows
from alignlab.data.unpaired import UnpairedPreference, load_unpaired, mismatch, unpaired_from_rows
from alignlab.errors import ConfigError
from alignlab.models.adapters import add_lora, has_adapters
from alignlab.models.checkpoints import load_model, load_tokenizer
from alignlab.models.policy import Policy
from alignlab.training.reward_functions import LoadedReward, load_reward, load_weighted
from alignlab.types import Prompt

logger = logging.getLogger(__name__)
Model = str | PreTrainedModel | PeftModel
Reward = str | RewardSettings | Callable[..., Any] | tuple[str | Callable[..., Any], float]
Rewards = Reward | Sequence[Reward]
_Made = TypeVar("_Made")
Dataset = str | DataSettings | Sequence[Prompt] | Iterable[Mapping[str, Any]]


def make_accelerator() -> Accelerator:
    """The ranks and the device of this process: a GPU where there is one, else the CPU."""
    return Accelerator(cpu=not torch.cuda.is_available())


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
        ConfigError: there is no tokenizer, or all of a bfloat16 model's weights would be trained.
    """
    model, tokenizer = resolve_base(model, tokenizer, adapted=peft_config is not None)
    if peft_config is not None:
        if isinstance(model, PeftModel):
            raise ConfigError("the model has an adapter already, and peft_config asks for another; leave one out")
        model = add_lora(model, peft_config)
    if isinstance(model, PeftModel) and not any(p.requires_grad for p in model.parameters()):
        model.set_adapter(model.active_adapter)  # as one loaded by name, to be trained further
    _check_trained_dtype(model)
    model.to(device)  # type: ignore[arg-type]  # transformers' stubs miss torch's signature
    return model, tokenizer


def resolve_base(
    model: Model, tokenizer: str | PreTrainedTokenizerBase | None, *, adapted: bool
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The model as it is given, or loaded by name in bfloat16 where an adapter will be put on it; and its tokenizer.

    Raises:
        ConfigError: there is no tokenizer.
    """
    tokenizer = _resolve_tokenizer(model, tokenizer)
    if isinstance(model, str):
        model = load_model(model, dtype=torch.bfloat16 if adapted else torch.float32)
    return model, tokenizer


def _resolve_tokenizer(model: Model, tokenizer: str | PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        tokenizer = model if isinstance(model, str) else model.config.name_or_path or None
    if tokenizer is None:
        raise ConfigError("tokenizer is not given, and the model has no name to find it by; pass tokenizer=")
    return load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer


def _check_trained_dtype(model: PreTrainedModel | PeftModel) -> None:
    low = [n for n, p in model.named_parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if low:
        raise ConfigError(
            f"{len(low)} weights would be trained in {model.dtype}, first {low[0]}, and an optimizer's small updates "
            "are lost in its rounding; load the model in float32, or train an adapter (lora)"
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
    """A frozen copy of the policy; None for an adapter, whose reference is the base with the adapter off."""
    if has_adapters(policy.model):
        if any("lora_B" in name and bool(p.any()) for name, p in policy.named_parameters()):
            logger.warning(
                "the adapter is not a new one: the reference is the base without it, and not the policy that the "
                "training starts from; to change that, merge the adapter (alignlab merge) and train from the result"
            )
        return None
    return copy.deepcopy(policy).requires_grad_(False).eval()


def resolve_examples(dataset: Any, tokenizer: PreTrainedTokenizerBase) -> Sequence[Example]:
    """Supervised examples from a path, settings, rows as `examples_from_rows` reads them, or examples made already."""
    return _resolve(
        dataset, Example, lambda settings: load_examples(settings, tokenizer),
        lambda rows, settings: examples_from_rows(rows, settings, tokenizer),
    )


def resolve_preferences(
    dataset: Any, tokenizer: PreTrainedTokenizerBase, **columns: str | None
) -> Sequence[Preference]:
    """Preferences from a path, settings, rows as `preferences_from_rows` reads them, or preferences made already.

    Args:
        columns: margin_column and probability_column, see there.
    """
    return _resolve(
        dataset, Preference, lambda settings: load_preferences(settings, tokenizer, **columns),
        lambda rows, settings: preferences_from_rows(rows, settings, tokenizer, **columns),
    )


def resolve_unpaired(dataset: Any, tokenizer: PreTrainedTokenizerBase) -> Sequence[UnpairedPreference]:
    """Unpaired preferences from a path, settings, rows as `unpaired_from_rows` reads them, or made already."""
    found = _resolve(
        dataset, UnpairedPreference, lambda settings: load_unpaired(settings, tokenizer),
        lambda rows, settings: unpaired_from_rows(rows, settings, tokenizer),
    )
    return mismatch(found) if isinstance(found, list) else found


def _resolve(
    dataset: Any, kind: type[_Made], load: Callable[[DataSettings], Sequence[_Made]],
    read: Callable[[list[Any], DataSettings], Sequence[_Made]],
) -> Sequence[_Made]:
    """What a path or settings name, by `load`; rows, by `read`; or a list of what was made already."""
    if isinstance(dataset, str | DataSettings):
        return load(DataSettings(path=dataset) if isinstance(dataset, str) else dataset)
    rows = list(dataset)
    return rows if all(isinstance(row, kind) for row in rows) else read(rows, DataSettings(path="rows"))


def resolve_prompts(dataset: Dataset | None, tokenizer: PreTrainedTokenizerBase) -> Sequence[Prompt]:
    """Prompts from a path, settings, rows with TRL's `prompt` or `messages` columns, or prompts made already."""
    if dataset is None:
        return ()
    if isinstance(dataset, str):
        dataset = DataSettings(path=dataset)
    if isinstance(dataset, DataSettings):
        return load_prompts(dataset, tokenizer)
    if isinstance(dataset, PromptDataset):
        return dataset
    rows: list[Any] = list(dataset)
    if all(isinstance(row, Prompt) for row in rows):
        return rows
    return prompts_from_rows(rows, DataSettings(path="rows"), tokenizer)

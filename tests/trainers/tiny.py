"""Tiny data, a teacher, and a case of each trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from alignlab import (
    DistillTrainer,
    DPOTrainer,
    GKDTrainer,
    GRPOTrainer,
    KTOTrainer,
    LoraSettings,
    OnlineDPOTrainer,
    OnPolicyDistillTrainer,
    PPOTrainer,
    RewardTrainer,
    SFTTrainer,
)
from alignlab.config import trainers as configs
from alignlab.data.examples import Example
from alignlab.data.preferences import Preference
from alignlab.data.unpaired import UnpairedPreference
from alignlab.models.hub.checkpoints import new_model, save_model
from tests.settings import merged
from tests.trainers.conftest import DENSE, even_ids


def examples(count: int, seed: int = 0) -> list[Example]:
    """Random prompts of 1 to 5 tokens with 1 to 5 taught ones."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for _ in range(count):
        prompt, taught = (int(torch.randint(1, 6, (), generator=generator)) for _ in range(2))
        ids = torch.randint(0, 250, (prompt + taught,), generator=generator).tolist()
        items.append(Example(tuple(ids), (False,) * prompt + (True,) * taught))
    return items


def pairs(count: int, seed: int = 0) -> list[Preference]:
    """Random preferences of a few tokens."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(0, 250, (length,), generator=generator).tolist())

    return [Preference(ids(2, 6), ids(1, 5), ids(1, 7)) for _ in range(count)]


def labelled(count: int, seed: int = 0) -> list[UnpairedPreference]:
    """Random completions; of three, two are good."""
    return [UnpairedPreference(pair.prompt, pair.chosen, i % 3 > 0) for i, pair in enumerate(pairs(count, seed))]


def prompts(count: int) -> list[dict[str, Any]]:
    """Rows with a prompt and an answer."""
    return [{"prompt": f"ab{i}", "answer": str(i)} for i in range(count)]


def save_teacher(folder: Path, tokenizer: PreTrainedTokenizerBase, architecture: Any = DENSE, seed: int = 7) -> str:
    """Save a model whose distributions are not flat, with its tokenizer; returns its folder."""
    torch.manual_seed(seed)
    model = new_model(
        architecture, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.no_grad():
        for weight in model.get_output_embeddings().parameters():
            weight.mul_(8)
    save_model(model, folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@dataclass(frozen=True)
class Case:
    """A trainer with a config and data on which a step takes less than a second.

    Attributes:
        trainer, config: classes.
        settings: of the config, beside those that every case has.
        data: makes the training data.
        rewards: reward functions of an online trainer.
        lora: whether an adapter is trained.
        has_teacher: whether the config names a teacher.
        held_out: makes the held-out data of an offline trainer.
    """

    trainer: Any
    config: Any
    settings: dict[str, Any]
    data: Callable[[], Any]
    rewards: tuple[Any, ...] | None = None
    lora: bool = False
    has_teacher: bool = False
    held_out: Callable[[], Any] | None = None


ROLLOUTS: dict[str, Any] = {"num_prompts": 4, "group_size": 4, "sampling": {"max_new_tokens": 6}}
CRITIC: dict[str, Any] = {"learning_rate": 1e-2}  # as the policy; the default of ten times that magnifies rounding
CASES = {
    "sft": Case(
        SFTTrainer, configs.SFTConfig, {"num_sequences": 4}, lambda: examples(8), held_out=lambda: examples(3, seed=1)
    ),
    "sft_options": Case(
        SFTTrainer, configs.SFTConfig,
        {
            "num_sequences": 4, "label_smoothing": 0.1, "z_loss_coef": 1e-2,
            "optim": {"weight_decay": 0.5, "weight_decay_on": ["embeddings", "norms"]},
        },
        lambda: examples(8), held_out=lambda: examples(3, seed=1),
    ),
    "dpo_early_stopping": Case(
        DPOTrainer, configs.DPOConfig,
        {"num_pairs": 4, "eval_every_steps": 1, "early_stopping": {"metric": "loss", "patience": 2, "min_delta": 9.0}},
        lambda: pairs(8), lora=True, held_out=lambda: pairs(3, seed=1),
    ),
    "reward_ema": Case(
        RewardTrainer, configs.RewardConfig,
        {
            "num_pairs": 4, "ema": {"decay": 0.5}, "eval_every_steps": 1,
            "early_stopping": {"metric": "loss", "patience": 2, "min_delta": 9.0},
        },
        lambda: pairs(8), held_out=lambda: pairs(3, seed=1),
    ),
    "dpo": Case(
        DPOTrainer, configs.DPOConfig, {"num_pairs": 4}, lambda: pairs(8), lora=True, held_out=lambda: pairs(3, seed=1)
    ),
    "kto": Case(
        KTOTrainer, configs.KTOConfig, {"num_sequences": 6}, lambda: labelled(12), lora=True,
        held_out=lambda: labelled(5, seed=1),
    ),
    "reward": Case(
        RewardTrainer, configs.RewardConfig, {"num_pairs": 4}, lambda: pairs(8), held_out=lambda: pairs(3, seed=1)
    ),
    "reward_lora": Case(RewardTrainer, configs.RewardConfig, {"num_pairs": 4}, lambda: pairs(8), lora=True),
    "distill": Case(DistillTrainer, configs.DistillConfig, {"num_sequences": 4}, lambda: examples(8), has_teacher=True),
    "distill_top_k": Case(
        DistillTrainer, configs.DistillConfig, {"num_sequences": 4, "top_k": 9}, lambda: examples(8), has_teacher=True
    ),
    "grpo": Case(GRPOTrainer, configs.GRPOConfig, ROLLOUTS, lambda: prompts(8), (even_ids,)),
    "ppo": Case(
        PPOTrainer, configs.PPOConfig, ROLLOUTS | {"critic": CRITIC}, lambda: prompts(8), (even_ids,), lora=True
    ),
    "ppo_critic_model": Case(
        PPOTrainer, configs.PPOConfig,
        ROLLOUTS | {"critic": CRITIC | {"form": "model"}, "memory": {"gradient_checkpointing": True}},
        lambda: prompts(8), (even_ids,), lora=True,
    ),
    "ppo_critic_head": Case(
        PPOTrainer, configs.PPOConfig, ROLLOUTS | {"critic": CRITIC | {"form": "head"}, "num_minibatches": 2},
        lambda: prompts(8), (even_ids,), lora=True,
    ),
    "grpo_ema": Case(
        GRPOTrainer, configs.GRPOConfig, ROLLOUTS | {"ema": {"decay": 0.5}, "eval_every_steps": 1}, lambda: prompts(8),
        (even_ids,), lora=True,
    ),
    "online_dpo": Case(
        OnlineDPOTrainer, configs.OnlineDPOConfig, ROLLOUTS, lambda: prompts(8), (even_ids,), lora=True
    ),
    "gkd": Case(
        GKDTrainer, configs.GKDConfig, ROLLOUTS | {"group_size": 1}, lambda: prompts(8), (), has_teacher=True
    ),
    "on_policy_distill": Case(
        OnPolicyDistillTrainer, configs.OnPolicyDistillConfig, ROLLOUTS, lambda: prompts(8), (), has_teacher=True
    ),
}
ONLINE = [name for name, case in CASES.items() if case.rewards is not None]
REWARDED = [name for name in ONLINE if CASES[name].rewards]


def make_case(
    name: str, folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase, *, rewards: Any = None,
    callbacks: Any = (), held_out: Any = None, **changes: Any,
) -> Any:
    """Return the trainer of a case.

    Args:
        folder: for its run and, beside it, its teacher.
        model: to train.
        rewards: instead of the case's.
        held_out: data to evaluate on, instead of the case's.
        changes: of its settings.
    """
    case = CASES[name]
    base: dict[str, Any] = {
        "output_dir": folder, "num_steps": 3, "optim": {"learning_rate": 1e-2}, "trackers": (),
    }
    if case.has_teacher:
        teacher = folder.parent / "teacher"
        if not teacher.exists():
            save_teacher(teacher, tokenizer)
        base["teacher"] = {"name": str(teacher)}
    config = case.config(**merged(merged(base, case.settings), changes))
    options: dict[str, Any] = {"tokenizer": tokenizer, "callbacks": callbacks}
    if case.lora:
        options["peft_config"] = LoraSettings(rank=4)
    if held_out is not None or case.held_out is not None:
        options["eval_dataset"] = case.held_out() if held_out is None else held_out
    if case.rewards is None:
        return case.trainer(model, config, case.data(), **options)
    return case.trainer(model, list(case.rewards) if rewards is None else rewards, config, case.data(), **options)

"""Run by torchrun: a trainer other than GRPO on two ranks. Usage: rank_others.py FOLDER KIND FORM, see `main`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from alignlab.config.model import LoraSettings
from alignlab.config.trainers import DPOConfig, KTOConfig, OnlineDPOConfig, PPOConfig, RewardConfig
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.models.hub.checkpoints import new_model
from alignlab.trainers.dpo import DPOTrainer
from alignlab.trainers.kto import KTOTrainer
from alignlab.trainers.online_dpo import OnlineDPOTrainer
from alignlab.trainers.ppo import PPOTrainer
from alignlab.trainers.reward import RewardTrainer
from tests.trainers.conftest import DENSE, even_ids
from tests.trainers.tiny import labelled, pairs


def one_rank_ties(*, completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Give equal rewards on the second rank, which then has no pair and must still call every collective."""
    values = even_ids(completion_ids=completion_ids, **columns)
    return [0.0] * len(values) if os.environ["RANK"] == "1" else values


def main() -> None:
    folder, kind, form = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    os.environ["ALIGNLAB_CACHE"] = str(folder / "cache")
    tokenizer = train_tokenizer(["abc abd ab ba 123"], vocab_size=262)
    torch.manual_seed(0)
    model = new_model(DENSE, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1)
    shared: dict[str, Any] = {
        "output_dir": folder / "run", "num_steps": 2, "optim": {"learning_rate": 1e-2}, "trackers": (),
    }
    lora, rows = LoraSettings(rank=2), [{"prompt": f"ab{i}"} for i in range(12)]
    trainer: PPOTrainer | DPOTrainer | KTOTrainer | OnlineDPOTrainer | RewardTrainer
    if kind == "ppo":
        config = PPOConfig(
            **shared, num_prompts=4, sampling={"max_new_tokens": 6}, critic={"form": form},
            memory={"gradient_checkpointing": True}
        )
        trainer = PPOTrainer(model, even_ids, config, rows, tokenizer=tokenizer, peft_config=lora)
    elif kind == "online_dpo":
        online = OnlineDPOConfig(
            **shared, num_prompts=4, sampling={"max_new_tokens": 6}, memory={"tokens_per_microbatch": 16}
        )
        trainer = OnlineDPOTrainer(model, one_rank_ties, online, rows, tokenizer=tokenizer, peft_config=lora)
    elif kind == "reward":
        trainer = RewardTrainer(
            model, RewardConfig(**shared, num_pairs=4), pairs(8), eval_dataset=pairs(3, seed=1),
            tokenizer=tokenizer, peft_config=lora if form == "lora" else None,
        )
    elif kind == "kto":
        kto = KTOConfig(**shared, num_sequences=4, memory={"tokens_per_microbatch": 12})
        trainer = KTOTrainer(
            model, kto, labelled(12), eval_dataset=labelled(6, seed=1), tokenizer=tokenizer, peft_config=lora
        )
    else:
        trainer = DPOTrainer(
            model, DPOConfig(**shared, num_pairs=4), pairs(8), eval_dataset=pairs(3, seed=1), tokenizer=tokenizer,
            peft_config=lora,
        )
    trainer.train()
    weights = {
        f"{role}{name}": p.detach().clone()
        for role, learner in trainer.learners.items() for name, p in learner.trained.items()
    }
    save_file(weights, folder / f"rank{os.environ['RANK']}.safetensors")


if __name__ == "__main__":
    main()

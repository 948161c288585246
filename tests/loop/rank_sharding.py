"""Run by a launcher: trainings that end after two steps, and copies of them that go on with weights in other places.

Usage: rank_sharding.py FOLDER
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from alignlab import LoraSettings
from alignlab.config.trainers import GRPOConfig
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.models.hub.checkpoints import new_model
from alignlab.trainers.grpo import GRPOTrainer
from tests.trainers.conftest import DENSE, SPARSE, even_ids
from tests.trainers.steps import weights_of

MODELS: dict[str, tuple[dict[str, Any], torch.dtype, LoraSettings | None]] = {
    "dense": (DENSE, torch.float32, None),
    "tied": (DENSE | {"tie_word_embeddings": True}, torch.float32, None),
    "mixture": (SPARSE, torch.float32, None),
    "shared layers": (DENSE | {"num_hidden_layers": 4, "shared_layers": [0, 0, 1, 0]}, torch.float32, None),
    "adapter on shared layers": (DENSE | {"shared_layers": [0, 0]}, torch.float32, LoraSettings(rank=4)),
    "averaged": (DENSE, torch.float32, None),
    "averaged in bfloat16": (DENSE, torch.bfloat16, None),
    "all in bfloat16": (DENSE, torch.bfloat16, None),
    "adapter on a base in bfloat16": (DENSE, torch.bfloat16, LoraSettings(rank=4)),
}
CHANGES = {
    "dense": [
        ("ddp", "ddp"), ("fsdp2", "fsdp2"), ("ddp", "fsdp2"), ("fsdp2", "zero1"), ("zero1", "zero3"), ("zero3", "ddp"),
        ("zero3", "zero3"), ("zero2", "zero2"),
    ],
    "tied": [("ddp", "ddp"), ("fsdp2", "fsdp2"), ("zero2", "zero3")],
    "mixture": [("ddp", "ddp"), ("ddp", "fsdp2"), ("fsdp2", "zero2"), ("zero3", "fsdp2")],
    "shared layers": [("ddp", "ddp"), ("fsdp2", "fsdp2"), ("fsdp2", "zero3"), ("zero3", "zero3")],
    "adapter on shared layers": [("ddp", "ddp"), ("zero3", "fsdp2")],
    "averaged": [("ddp", "ddp"), ("fsdp2", "fsdp2"), ("fsdp2", "ddp"), ("ddp", "fsdp2")],
    "averaged in bfloat16": [("ddp", "ddp"), ("fsdp2", "fsdp2")],
    "all in bfloat16": [
        ("ddp", "ddp"), ("ddp", "fsdp2"), ("ddp", "zero1"), ("zero2", "zero2"), ("fsdp2", "zero3"), ("zero3", "ddp"),
    ],
    "adapter on a base in bfloat16": [("ddp", "ddp"), ("fsdp2", "ddp"), ("ddp", "zero1"), ("zero2", "zero3")],
}
"""Where the weights of a model are in the first two steps, and in the third."""
AVERAGED = tuple(name for name in MODELS if name.startswith("averaged"))
"""Models that a run saves as the average of their weights."""


def train(folder: Path, model: str, strategy: str, num_steps: int) -> dict[str, torch.Tensor]:
    """Train to a number of steps, from a checkpoint if there is one, and return the weights in training."""
    tokenizer = train_tokenizer(["abc abd ab ba 123"], vocab_size=262)
    torch.manual_seed(0)
    architecture, dtype, lora = MODELS[model]
    config = GRPOConfig(
        output_dir=folder, num_steps=num_steps, num_prompts=4, group_size=2, optim={"learning_rate": 1e-3},
        sampling={"max_new_tokens": 4}, trackers=(), kl={"coef": 0.1}, sharding={"strategy": strategy},
        memory={"tokens_per_microbatch": 16}, ema={"decay": 0.5} if model in AVERAGED else None,
    )  # type: ignore[arg-type]  # pydantic reads the sections
    trainer = GRPOTrainer(
        new_model(architecture, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1).to(dtype), even_ids, config,
        [{"prompt": f"ab{i}", "answer": "a"} for i in range(8)], tokenizer=tokenizer, peft_config=lora,
    )
    trainer.train(resume=num_steps > 2)
    return weights_of(trainer)


def main() -> None:
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    for model in MODELS:
        for begun in dict.fromkeys(first for first, _ in CHANGES[model]):
            train(folder / model / begun, model, begun, 2)
            for first, then in CHANGES[model]:
                if first != begun:
                    continue
                run = folder / model / f"{first} {then}"
                if rank == "0":
                    shutil.copytree(folder / model / begun, run)
                torch.distributed.barrier()
                weights = {name: weight.contiguous() for name, weight in train(run, model, then, 3).items()}
                save_file(weights, run / f"rank{rank}.safetensors")


if __name__ == "__main__":
    main()

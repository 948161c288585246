"""Run by torchrun: mixtures of several routers, trained on two ranks with their weights in different places.

Usage: rank_routers.py FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from alignlab.config.trainers import SFTConfig
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.models.hub.checkpoints import new_model
from alignlab.trainers.sft import SFTTrainer
from tests.models.routers_cases import ROUTERS
from tests.trainers.conftest import SPARSE
from tests.trainers.steps import weights_of
from tests.trainers.tiny import examples

SHARDED: dict[str, dict[str, Any]] = {
    "noisy": {"router_importance_loss_coef": 0.01},
    "reinforce": {},
    "hash": {},
    "groups_v2": {"router_comm_aux_loss_coef": 0.1},
}
STRATEGIES = ("ddp", "fsdp2", "zero3")


def train(folder: Path, name: str, strategy: str) -> dict[str, torch.Tensor]:
    """Train three steps, and return the weights in training."""
    tokenizer = train_tokenizer(["abc abd ab ba 123"], vocab_size=262)
    torch.manual_seed(0)
    shape = SPARSE | {"num_experts": 6} | ROUTERS[name] | SHARDED[name]
    config = SFTConfig(
        output_dir=folder, num_steps=3, num_sequences=4, optim={"learning_rate": 1e-3}, trackers=(),
        sharding={"strategy": strategy}, memory={"tokens_per_microbatch": 32, "gradient_checkpointing": True},
    )  # type: ignore[arg-type]  # pydantic reads the sections
    model = new_model(shape, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1)
    trainer = SFTTrainer(model, config, examples(8), tokenizer=tokenizer)
    trainer.train()
    return weights_of(trainer)


def main() -> None:
    folder = Path(sys.argv[1])
    for name in SHARDED:
        for strategy in STRATEGIES:
            run = folder / name / strategy
            weights = {key: weight.contiguous() for key, weight in train(run, name, strategy).items()}
            save_file(weights, run / f"rank{os.environ['RANK']}.safetensors")


if __name__ == "__main__":
    main()

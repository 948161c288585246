"""Run by a launcher, or imported: a training that goes on after each of its steps on another number of ranks.

Usage: rank_resuming.py FOLDER STRATEGY NUM_STEPS
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.models.hub.checkpoints import new_model
from tests.trainers.conftest import DENSE
from tests.trainers.rank_cases import EPSILON
from tests.trainers.steps import weights_of
from tests.trainers.tiny import make_case

CASES = ("sft", "dpo", "kto", "grpo")


def train(name: str, folder: Path, strategy: str, num_steps: int) -> dict[str, torch.Tensor]:
    """Train a case to a number of steps, from its checkpoint if there is one, and return the weights in training."""
    tokenizer = train_tokenizer(["abc abd ab ba 123"], vocab_size=262)
    torch.manual_seed(0)
    model = new_model(DENSE, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1)
    trainer = make_case(
        name, folder / name, model, tokenizer, num_steps=num_steps, memory={"tokens_per_microbatch": 16},
        sharding={"strategy": strategy}, optim={"learning_rate": 1e-3, "schedule": "constant"},
        checkpoints={"with_model": name == "sft"},
    )
    for learner in trainer.learners.values():
        for group in learner.optimizer.param_groups:
            group["eps"] = EPSILON
    trainer.train(resume=(folder / name / "checkpoints").exists())
    return weights_of(trainer)


def main() -> None:
    folder, strategy, num_steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    os.environ["ALIGNLAB_CACHE"] = str(folder / "cache")
    for name in CASES:
        weights = {key: weight.contiguous() for key, weight in train(name, folder, strategy, num_steps).items()}
        save_file(weights, folder / f"{name}.{num_steps}.rank{os.environ['RANK']}.safetensors")


if __name__ == "__main__":
    main()

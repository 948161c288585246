"""Run by torchrun: distillation on as many ranks as there are. Usage: rank_distill.py FOLDER distill|gkd"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from alignlab.config.trainers import DistillConfig, GKDConfig
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.models.hub.checkpoints import new_model, save_model
from alignlab.trainers.distill import DistillTrainer
from alignlab.trainers.gkd import GKDTrainer
from tests.trainers.conftest import DENSE, SPARSE
from tests.trainers.tiny import examples


def train(folder: Path, kind: str) -> DistillTrainer | GKDTrainer:
    """Train for three steps with the teacher in `folder`."""
    tokenizer = train_tokenizer(["abc abd ab ba 123"], vocab_size=262)
    torch.manual_seed(0)
    model = new_model(DENSE, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1)
    shared: dict[str, Any] = {
        "output_dir": folder / "run", "num_steps": 3, "optim": {"learning_rate": 1e-2}, "trackers": (),
        "memory": {"tokens_per_microbatch": 16}, "teacher": {"name": str(folder / "teacher")},
    }
    trainer: DistillTrainer | GKDTrainer
    if kind == "distill":
        trainer = DistillTrainer(
            model, DistillConfig(**shared, num_sequences=4, top_k=9), examples(8), tokenizer=tokenizer
        )
    else:
        config = GKDConfig(**shared, num_prompts=4, student_frac=0.5, sampling={"max_new_tokens": 6})
        rows = [{"prompt": f"ab{i}", "answer": str(i)} for i in range(8)]
        trainer = GKDTrainer(model, (), config, rows, tokenizer=tokenizer)
    trainer.train()
    return trainer


def save_teacher(folder: Path) -> None:
    """Save a mixture of experts as the teacher."""
    tokenizer = train_tokenizer(["abc abd ab ba 123"], vocab_size=262)
    torch.manual_seed(7)
    model = new_model(SPARSE, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1)
    with torch.no_grad():
        for weight in model.get_output_embeddings().parameters():
            weight.mul_(8)  # a distribution that is far from uniform
    save_model(model, folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")


def main() -> None:
    folder = Path(sys.argv[1])
    os.environ["ALIGNLAB_CACHE"] = str(folder / "cache")
    trainer = train(folder, sys.argv[2])
    weights = {name: p.detach().clone() for name, p in trainer.learner.trained.items()}
    save_file(weights, folder / f"rank{os.environ['RANK']}.safetensors")


if __name__ == "__main__":
    main()

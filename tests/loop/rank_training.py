"""Run by torchrun: a short training of two ranks; resumes where there is a run. Usage: rank_training.py FOLDER STEPS"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from alignlab.config.rollout import SamplingSettings
from alignlab.config.trainers import GRPOConfig
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.models.hub.checkpoints import new_model
from alignlab.runs.folder import holds_run
from alignlab.trainers.grpo import GRPOTrainer
from tests.trainers.conftest import SPARSE, even_ids


def fails_on_the_second_rank(**columns: Any) -> list[float]:
    """Reward of 0, which raises on the second rank."""
    if os.environ["RANK"] == "1":
        raise RuntimeError("on the second rank")
    return [0.0] * len(columns["completions"])


def main() -> None:
    folder, num_steps = Path(sys.argv[1]), int(sys.argv[2])
    tokenizer = train_tokenizer(["abc abd ab ba 123"], vocab_size=262)
    torch.manual_seed(0)
    shape = SPARSE | {"router_bias_update_rate": 0.1}
    model = new_model(shape, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1)
    config = GRPOConfig(
        output_dir=folder / "run",
        recipe="reinforce_pp",
        num_steps=num_steps,
        num_prompts=4,
        group_size=4,
        optim={"learning_rate": 1e-2},
        sampling=SamplingSettings(max_new_tokens=6),
        kl={"coef": 0.1, "target": 0.01, "horizon": 16},
        trackers=(),
    )
    rows = [{"prompt": f"ab{i}"} for i in range(12)]
    trainer = GRPOTrainer(model, [even_ids, fails_on_the_second_rank], config, rows, tokenizer=tokenizer)
    trainer.train(resume=holds_run(config.output_dir))
    weights = {name: tensor.clone() for name, tensor in trainer.learner.module.state_dict().items()}
    weights["kl_coef"] = torch.tensor(trainer.algorithm.objective.kl_coef)
    save_file(weights, folder / f"rank{os.environ['RANK']}.safetensors")


if __name__ == "__main__":
    main()

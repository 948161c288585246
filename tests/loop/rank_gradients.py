"""Run by torchrun: the gradient of one update, its groups shared out over the ranks.

Usage: rank_gradients.py OUTPUT DTYPE
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from alignlab.config.rollout import SamplingSettings
from alignlab.config.trainers import GRPOConfig
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.models.hub.checkpoints import new_model
from alignlab.trainers.grpo import GRPOTrainer
from tests.loop.test_learner import experience, random_rollouts
from tests.trainers.conftest import SPARSE, even_ids

GROUPS = 4


def gradients(rank: int, ranks: int, folder: Path, dtype: str) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Return the gradient of the whole batch, of which this rank computes its share, and the metrics."""
    tokenizer = train_tokenizer(["abc abd ab ba 123"], vocab_size=262)
    torch.manual_seed(0)
    model = new_model(
        SPARSE, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, dtype=getattr(torch, dtype)
    )
    config = GRPOConfig(
        output_dir=folder / "run",
        recipe="dapo",
        num_prompts=GROUPS,
        group_size=4,
        sampling=SamplingSettings(max_new_tokens=512),
        kl={"coef": 0.1},
    )
    trainer = GRPOTrainer(model, even_ids, config, [{"prompt": "ab"}] * GROUPS, tokenizer=tokenizer)
    result: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> dict[str, float]:
        result.update({name: p.grad.clone() for name, p in trainer.learner.trained.items() if p.grad is not None})
        return {}

    trainer.learner._step = keep  # type: ignore[assignment, method-assign]
    rollouts = random_rollouts(seed=7, groups=GROUPS)
    advantages = torch.randn(GROUPS, 4, generator=torch.Generator().manual_seed(2))
    # The first rank holds three groups and the second one, in another number of packs.
    share = slice(0, GROUPS) if ranks == 1 else (slice(0, 3) if rank == 0 else slice(3, GROUPS))
    packs = experience(rollouts[share], trainer.learner.module, advantages[share], budget=30, share_prefix=True)
    metrics = trainer.learner.update(packs, trainer.algorithm.loss, trainer.algorithm.loss_weights)
    return result, metrics


def main() -> None:
    import os

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    output = Path(sys.argv[1])
    result, metrics = gradients(rank, ranks, output.parent, sys.argv[2])
    save_file(result, output.with_name(f"rank{rank}.safetensors"), metadata={"loss": repr(metrics["loss"])})


if __name__ == "__main__":
    main()

"""Run by torchrun: cases of `tests.trainers.tiny` on as many ranks as there are, under each of the strategies.

Usage: rank_cases.py FOLDER STRATEGY[,STRATEGY ...] [CASE ...]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.models.hub.checkpoints import new_model
from tests.curves import draw_no_curves
from tests.trainers.conftest import DENSE
from tests.trainers.steps import weights_of
from tests.trainers.tiny import CASES, make_case

SEED = 7
EPSILON = 1e-3


def train(name: str, folder: Path, strategy: str = "ddp") -> dict[str, torch.Tensor]:
    """Train a case, and return all that was trained."""
    tokenizer = train_tokenizer(["abc abd ab ba 123"], vocab_size=262)
    torch.manual_seed(0)
    model = new_model(DENSE, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1)
    settings = {"memory": {"tokens_per_microbatch": 16}, "sharding": {"strategy": strategy}}
    trainer = make_case(name, folder / name, model, tokenizer, **settings)
    if hasattr(trainer, "source"):
        sample_without_rank(trainer.source)
    for learner in trainer.learners.values():
        for group in learner.optimizer.param_groups:
            # Adam divides a gradient that is nothing but rounding by itself; with this epsilon it stays near 0.
            group["eps"] = EPSILON
    trainer.train()
    return weights_of(trainer)


def sample_without_rank(source: Any) -> None:
    """Sample every prompt with one seed. A rank's own seeds are by design others than those of a run on one rank."""
    sample = source._sample
    source._sample = lambda prompts, seed: sample(prompts, SEED)


def main() -> None:
    folder, strategies, names = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:] or CASES
    draw_no_curves()
    for strategy in strategies:
        os.environ["ALIGNLAB_CACHE"] = str(folder / strategy / "cache")
        for name in names:
            save_file(
                {key: weight.clone() for key, weight in train(name, folder / strategy, strategy).items()},
                folder / strategy / f"{name}.rank{os.environ['RANK']}.safetensors",
            )


if __name__ == "__main__":
    main()

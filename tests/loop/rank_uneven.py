"""Run by torchrun: trainings in which the ranks have unlike work, and must still meet. Usage: rank_uneven.py FOLDER"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.models.hub.checkpoints import new_model
from tests.trainers.conftest import DENSE, even_ids
from tests.trainers.steps import weights_of
from tests.trainers.tiny import make_case


def equal_on_the_second_rank(*, completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Give equal rewards on the second rank, which then has no pair and must still call every collective."""
    values = even_ids(completion_ids=completion_ids, **columns)
    return [0.0] * len(values) if os.environ["RANK"] == "1" else values


UNEVEN: dict[str, dict[str, Any]] = {
    "online_dpo": {"rewards": [equal_on_the_second_rank]},
    "gkd": {"student_frac": 0.5},  # each rank draws which of its prompts the dataset completes
}


def main() -> None:
    folder = Path(sys.argv[1])
    os.environ["ALIGNLAB_CACHE"] = str(folder / "cache")
    tokenizer = train_tokenizer(["abc abd ab ba 123"], vocab_size=262)
    for name, options in UNEVEN.items():
        torch.manual_seed(0)
        model = new_model(DENSE, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1)
        trainer = make_case(name, folder / name, model, tokenizer, **options)
        trainer.train()
        weights = {key: weight.clone() for key, weight in weights_of(trainer).items()}
        save_file(weights, folder / f"{name}.rank{os.environ['RANK']}.safetensors")


if __name__ == "__main__":
    main()

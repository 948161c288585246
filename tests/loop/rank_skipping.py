"""Run by a launcher: updates of which one has a gradient that is not finite, and one no token to train on.

Usage: rank_skipping.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from alignlab.config.trainers import SFTConfig
from alignlab.loop.accelerator import make_accelerator
from alignlab.loop.learner import Learner
from alignlab.loop.loss_weights import token_mean
from alignlab.models.hub.checkpoints import new_model
from alignlab.models.policy import Policy
from alignlab.models.weight_view import whole_tensors
from alignlab.types import Experience, Segments
from tests.trainers.conftest import DENSE

PLACES = {
    "ddp": {"strategy": "ddp"}, "fsdp2": {"strategy": "fsdp2"}, "zero1": {"strategy": "zero1"},
    "zero2": {"strategy": "zero2"}, "zero3": {"strategy": "zero3"},
    "zero2, states on the host": {"strategy": "zero2", "offload": "optimizer"},
    "zero3, all on the host": {"strategy": "zero3", "offload": "all"},
}
UPDATES = ("whole", "not finite", "whole", "empty", "whole")


def packs_of(rank: int, update: int) -> list[Experience]:
    """Three packs on the first rank and one on the second, in an update of which the kind is in `UPDATES`."""
    generator = torch.Generator().manual_seed(10 * update + rank)
    packs = []
    for length in (9, 6, 7) if rank == 0 else (11,):
        mask = torch.ones(length, dtype=torch.bool)
        mask[:2] = False
        segments = Segments((2, length - 2), (-1, 0), (-1, 0), (0, 0))
        advantages = torch.randn(length, generator=generator) * 30
        packs.append(Experience(
            torch.randint(2, 250, (length,), generator=generator), segments, mask, advantages=advantages
        ))
    if UPDATES[update] == "empty":
        packs = [replace(pack, completion_mask=torch.zeros_like(pack.completion_mask)) for pack in packs]
    if UPDATES[update] == "not finite" and rank == 1:
        packs = [replace(pack, advantages=torch.full_like(pack.advantages, torch.nan)) for pack in packs]
    return packs


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    for place, sharding in PLACES.items():
        torch.manual_seed(0)
        policy = Policy(new_model(DENSE, vocab_size=262, pad_token_id=0, eos_token_id=1))
        config = SFTConfig(
            sharding=sharding, optim={"learning_rate": 1e-3, "on_nonfinite": "skip", "weight_decay": 0.1}
        )  # type: ignore[arg-type]  # pydantic reads the sections
        learner = Learner(policy, config, make_accelerator(60.0), total_updates=len(UPDATES))
        norms = []
        for update in range(len(UPDATES)):
            metrics = learner.update(
                packs_of(rank, update), lambda output, pack: (-output.logprobs * pack.advantages, {}), token_mean
            )
            norms.append(metrics["grad_norm"])
        counts = {"skipped": learner.num_skipped, "empty": learner.num_empty, "taken": learner.num_updates}
        weights = {name: weight.clone() for name, weight in whole_tensors(learner.weights)}
        save_file(weights, folder / f"{place}.rank{rank}.safetensors")
        (folder / f"{place}.rank{rank}.json").write_text(json.dumps({"norms": norms, "counts": counts}))


if __name__ == "__main__":
    main()

"""Run by torchrun: a training on a cache in few dimensions; each rank writes its bases. Usage: rank_low_rank.py FOLDER

The second rank measures on other prompts, as a processor that rounds otherwise would get other bases.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from alignlab.config.trainers import GRPOConfig
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.models.hub.checkpoints import new_model
from alignlab.models.kv_approximation.low_rank_bases import LowRankBases
from alignlab.trainers.grpo import GRPOTrainer
from tests.trainers.conftest import DENSE, even_ids


def main() -> None:
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    tokenizer = train_tokenizer(["abc abd ab ba 123"], vocab_size=262)
    torch.manual_seed(0)
    model = new_model(DENSE, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # so that log-probs show what the cache does to the states
    config = GRPOConfig(
        output_dir=folder / "run", num_steps=2, num_prompts=4, group_size=4, optim={"learning_rate": 1e-2},
        sampling={"max_new_tokens": 12}, rollout={"kv_cache": {"type": "low_rank", "rank": 3}}, trackers=(),
    )
    measure, own = LowRankBases.measure, []

    def measure_otherwise(self: LowRankBases, model: Any, prompts: Any) -> None:
        measure(self, model, prompts if rank == "0" else prompts[::-1][:5])
        own.append(self.state())

    LowRankBases.measure = measure_otherwise  # type: ignore[method-assign]
    trainer = GRPOTrainer(model, [even_ids], config, [{"prompt": f"ab{i}"} for i in range(12)], tokenizer=tokenizer)
    assert trainer._kv_bases is not None
    used = trainer._kv_bases.state()
    gap = trainer.train().metrics["rollout_gap"]
    after = trainer._kv_bases.state()
    (folder / f"rank{rank}.json").write_text(json.dumps({"own": own[0], "used": used, "after": after, "gap": gap}))


if __name__ == "__main__":
    main()

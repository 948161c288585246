"""One of two ranks of a short training fails while it evaluates. Usage: rank_faults.py FOLDER RANK HOW TIMEOUT_S"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch

from alignlab.config.rollout import SamplingSettings
from alignlab.config.trainers import GRPOConfig
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.errors import AlignlabError
from alignlab.loop import rank_watchdog
from alignlab.models.hub.checkpoints import new_model
from alignlab.trainers.grpo import GRPOTrainer
from tests.loop.rank_watched import fail
from tests.trainers.conftest import DENSE, even_ids


def main() -> None:
    folder, failing, how, timeout_s = sys.argv[1:]
    rank_watchdog.BEAT_S, rank_watchdog.GRACE_S = 0.2, 5.0
    tokenizer = train_tokenizer(["abc abd ab ba 123"], vocab_size=262)
    torch.manual_seed(0)
    model = new_model(DENSE, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1)
    config = GRPOConfig(
        output_dir=Path(folder) / "run", num_steps=3, num_prompts=2, group_size=2, optim={"learning_rate": 1e-2},
        trackers=(),
        sampling=SamplingSettings(max_new_tokens=3), eval_every_steps=1, rank_timeout_s=float(timeout_s),
    )
    rows = [{"prompt": f"ab{i}", "answer": str(i)} for i in range(4)]
    trainer = GRPOTrainer(model, even_ids, config, rows, tokenizer=tokenizer, eval_dataset=rows[:2])
    evaluate = trainer.evaluate

    def failing_after_the_second_step() -> Any:
        if trainer.step == 2:
            fail(how)
        return evaluate()

    if os.environ["RANK"] == failing:
        trainer.evaluate = failing_after_the_second_step  # type: ignore[method-assign]
    try:
        trainer.train()
    except AlignlabError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    logging.basicConfig()
    main()

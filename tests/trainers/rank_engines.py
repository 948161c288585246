"""Run by a launcher: GRPO on several ranks with vLLM, whose weights come from ranks that hold them all or in parts.

Usage: rank_engines.py FOLDER JSON

The JSON holds a list of runs: {"name", "model", "strategy", "rollout"}.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from alignlab import GRPOTrainer, LoraSettings
from alignlab.config.trainers import GRPOConfig
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.models.hub.checkpoints import new_model
from tests.rollout.vllm.conftest import DENSE, QWEN3_MOE
from tests.trainers.conftest import even_ids
from tests.trainers.rank_cases import EPSILON
from tests.trainers.steps import weights_of

MODELS: dict[str, tuple[dict[str, Any], LoraSettings | None]] = {
    "dense": (DENSE, None),
    "adapter": (DENSE, LoraSettings(rank=4)),
    "mixture": (QWEN3_MOE, None),
}
NUM_STEPS = 3


def make_tokenizer() -> Any:
    """Return the tokenizer of all runs."""
    return train_tokenizer(["abc abd ab ba 123"], vocab_size=262)


def make_model(name: str) -> Any:
    """Return the model of a run, without its adapter."""
    torch.manual_seed(0)
    return new_model(MODELS[name][0], vocab_size=len(make_tokenizer()), pad_token_id=0, eos_token_id=1)


def train(folder: Path, model: str, strategy: str, rollout: dict[str, Any]) -> Any:
    """Train, and return the trainer."""
    config = GRPOConfig(
        output_dir=folder, num_steps=NUM_STEPS, num_prompts=4, group_size=2, optim={"learning_rate": 1e-2},
        sampling={"max_new_tokens": 4}, trackers=(), sharding={"strategy": strategy}, rollout=rollout,
        memory={"tokens_per_microbatch": 16},
    )  # type: ignore[arg-type]  # pydantic reads the sections
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own, when it is imported and started
        trainer = GRPOTrainer(
            make_model(model), even_ids, config, [{"prompt": f"ab{i}", "answer": "a"} for i in range(8)],
            tokenizer=make_tokenizer(), peft_config=MODELS[model][1],
        )
    for group in trainer.learner.optimizer.param_groups:
        group["eps"] = EPSILON
    trainer.train()
    return trainer


def main() -> None:
    gc.unfreeze = lambda: None  # by which vLLM, at the end of an engine, has all imports looked through
    folder = Path(sys.argv[1])
    for run in json.loads(sys.argv[2]):
        trainer = train(folder / run["name"], run["model"], run["strategy"], run["rollout"])
        path = folder / f"{run['name']}.rank{os.environ['RANK']}.safetensors"
        save_file({name: weight.contiguous() for name, weight in weights_of(trainer).items()}, path)
        trainer.source.engine.close()


if __name__ == "__main__":
    main()

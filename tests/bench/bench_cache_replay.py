"""Training with an approximate cache at equal budget: exact, approximate alone, corrected, and replayed.

    python -m tests.bench.bench_cache_replay [--cache int4] [--steps 50] [--seeds 1]

A model of 4 layers, 64 wide, from nothing, learns by GRPO to sample token ids that 8 divides: 8 prompts x 8 completions
x 48 tokens a step. "uncorrected" is what the configuration refuses: the approximate engine with a trainer that computes
exactly and weighs nothing. For each: reward of the last tenth of the steps, and the mean distance of engine and trainer
in nats a token, in the first and in the last tenth. Prints a table, and JSON last.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from typing import Any

import torch

from alignlab import GRPOTrainer
from alignlab.config.trainers import GRPOConfig
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.loop.correction import Correction
from alignlab.models.hub.checkpoints import new_model

CACHES: dict[str, dict[str, Any]] = {
    "int8": {"type": "int8"}, "fp8": {"type": "fp8"}, "int4": {"type": "int4", "group": 8, "recent": 0},
    "window": {"type": "window", "tokens": 8, "sinks": 2},
    "evict": {"type": "evict", "heavy": 6, "recent": 3, "sinks": 1, "interval": 4, "observed": 4},
    "top_k": {"type": "top_k", "tokens": 4, "recent": 1}, "threshold": {"type": "threshold", "mass": 0.5, "recent": 1},
    "low_rank": {"type": "low_rank", "rank": 8},
}
SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def main() -> None:
    args = _arguments()
    logging.disable(logging.WARNING)
    tokenizer = train_tokenizer(["abc abd ab ba 123"], vocab_size=262)
    print(f"{args.cache}, {args.steps} steps, {args.seeds} seeds, {torch.get_num_threads()} threads")
    print(f"{'':14}{'reward':>16}{'gap, first':>12}{'gap, last':>12}{'CPU s':>8}")
    results: dict[str, Any] = {}
    for name in ("exact", "uncorrected", "corrected", "replayed"):
        runs = [_run(name, CACHES[args.cache], tokenizer, args.steps, seed) for seed in range(args.seeds)]
        rewards, first, last, seconds = ([run[key] for run in runs] for key in ("reward", "first", "last", "seconds"))
        results[name] = runs
        spread = f" ± {statistics.stdev(rewards):.3f}" if len(rewards) > 1 else ""
        print(
            f"{name:14}{f'{statistics.mean(rewards):.3f}{spread}':>16}{statistics.mean(first):12.1e}"
            f"{statistics.mean(last):12.1e}{statistics.mean(seconds):8.1f}", flush=True,
        )
    print(json.dumps({"cache": args.cache, "steps": args.steps, "results": results}))


def _run(name: str, cache: dict[str, Any], tokenizer: Any, num_steps: int, seed: int) -> dict[str, float]:
    """Train once, and return the figures of the run."""
    torch.manual_seed(seed)
    model = new_model(
        SHAPE, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )
    with torch.no_grad():  # logits that show what a cache does to the states
        model.get_output_embeddings().weight.mul_(10)
    kv_cache = {"type": "exact"} if name == "exact" else cache | {"replay": name == "replayed"}
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig.model_validate({
            "output_dir": f"{folder}/run", "num_steps": num_steps, "num_prompts": 8, "group_size": 8, "seed": seed,
            "optim": {"learning_rate": 2e-5}, "sampling": {"max_new_tokens": 48}, "trackers": (),
            "rollout": {"kv_cache": kv_cache},
        })
        trainer = GRPOTrainer(
            model, divisible_ids, config, [{"prompt": f"ab{i}"} for i in range(64)], tokenizer=tokenizer
        )
        if name == "uncorrected":
            trainer.algorithm.objective.correction = Correction("none")
        metrics = [trainer.train_step(step) for step in range(1, num_steps + 1)]
    tenth = max(1, num_steps // 10)
    return {
        "reward": statistics.mean(step["reward"] for step in metrics[-tenth:]),
        "first": statistics.mean(step["rollout_gap"] for step in metrics[:tenth]),
        "last": statistics.mean(step["rollout_gap"] for step in metrics[-tenth:]),
        "seconds": time.process_time() - start,
    }


def divisible_ids(*, completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Return the fraction of tokens whose id 8 divides."""
    return [sum(token % 8 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", choices=CACHES, default="int4")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()

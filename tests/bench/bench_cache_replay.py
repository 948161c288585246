"""Training with an approximate cache at equal budget: exact, approximate alone, corrected, and replayed.

    python -m tests.bench.bench_cache_replay [--caches int4 fp8 window] [--steps 50] [--seeds 3] [--dtype float32]
        [--start MODEL]

A model of 4 layers, hidden size 64, learns sums and differences of three digits (configs/grpo_tiny_moe_cpu.yaml with an
easier task) by SFT. From there every arm trains by GRPO with several seeds: on the same prompts in the same order,
which is checked, with the same settings and as many steps. "uncorrected" is what the configuration refuses: the
approximate engine with a trainer that computes exactly and weighs nothing. A line for each arm, means over seeds with
the standard deviation: the reward of the first and of the last tenth of the steps, as the engine samples; the fraction
of held-out problems that sampling answers right after the training, with the engine's cache and with an exact one, and
with the latter greedily; the mean distance of engine and trainer in nats a token, in the first and in the last tenth of
the steps; tokens sampled; CPU time. Prints a table, and JSON last.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from alignlab.config.loader import load_config
from alignlab.config.rollout import RolloutSettings
from alignlab.config.run import RunConfig
from alignlab.files.digests import json_digest
from alignlab.loop.correction import Correction
from alignlab.models.hub.checkpoints import load_model, load_tokenizer
from alignlab.rollout.engine import make_engine
from alignlab.run_from_config import warm_start_trainer
from alignlab.starting_model import make_model, make_tokenizer, model_dtype
from alignlab.trainers.from_config import make_trainer
from alignlab.types import Rollout

CONFIG = Path(__file__).parents[2] / "configs" / "grpo_tiny_moe_cpu.yaml"
CACHES: dict[str, dict[str, Any]] = {
    "int8": {"type": "int8"}, "fp8": {"type": "fp8"}, "int4": {"type": "int4", "group": 8, "recent": 0},
    "window": {"type": "window", "tokens": 8, "sinks": 2},
    "evict": {"type": "evict", "heavy": 6, "recent": 3, "sinks": 1, "interval": 4, "observed": 4},
    "top_k": {"type": "top_k", "tokens": 4, "recent": 1}, "threshold": {"type": "threshold", "mass": 0.5, "recent": 1},
    "low_rank": {"type": "low_rank", "rank": 8},
}
ARMS = ("uncorrected", "corrected", "replayed")
FIGURES = ("first", "reward", "own cache", "exact cache", "greedy", "gap, first", "gap, last", "tokens", "CPU s")


def main() -> None:
    """Train, and print a line for each arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caches", choices=CACHES, nargs="+", default=["int4", "fp8", "window"])
    parser.add_argument("--preset", default="gqa", help="kinds of layers; moe is corrected by another rule than gqa")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and engine")
    parser.add_argument("--start", type=Path, help="model of a warm start of this benchmark or of bench_presets")
    parser.add_argument("--warm-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    print(f"{args.dtype}, {args.preset}, {args.steps} steps at {args.learning_rate}, {args.seeds} seeds")
    print(f"{'':20}" + "".join(f"{figure:>15}" for figure in FIGURES))
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        start = args.start or _warm_start(args, Path(folder) / "warm")
        for cache, arm in [(None, "exact"), *((cache, arm) for cache in args.caches for arm in ARMS)]:
            name = arm if cache is None else f"{cache} {arm}"
            results[name] = [_train(args, seed, start, cache, arm) for seed in range(args.seeds)]
            _print(name, results[name])
            for run, exact in zip(results[name], results["exact"], strict=True):
                assert run["prompts"] == exact["prompts"], "every arm sees the same prompts in the same order"
    print(json.dumps({name: str(value) for name, value in vars(args).items()} | {"results": results}))


def _config(args: argparse.Namespace, seed: int, folder: Path, *more: str) -> RunConfig:
    return load_config(CONFIG, [
        *more,
        f"model.architecture={{preset: {args.preset}}}", f"model.dtype={args.dtype}", "trainer.trackers=[]",
        "data.task_options={min_terms: 3, max_terms: 3, min_digits: 1, max_digits: 1}",
        f"warm_start.trainer.num_steps={args.warm_steps}", "evaluation={num_problems: 128, num_samples: 4}",
        f"trainer.seed={seed}", f"trainer.output_dir={folder}", f"trainer.num_steps={args.steps}",
        "trainer.num_prompts=16", "trainer.optim={schedule: linear, warmup_steps: 5}",
        f"trainer.optim.learning_rate={args.learning_rate}", "warm_start.trainer.trackers=[]",
    ])  # fmt: skip


def _warm_start(args: argparse.Namespace, folder: Path) -> Path:
    """Fine-tune a new model, and return its folder."""
    config = _config(args, 0, folder)
    tokenizer = make_tokenizer(config)
    torch.manual_seed(0)
    model = make_model(config.model, tokenizer, torch.float32)
    assert config.warm_start is not None
    return warm_start_trainer(config, config.warm_start, model, tokenizer).train().model_path


def _train(args: argparse.Namespace, seed: int, start: Path, cache: str | None, arm: str) -> dict[str, Any]:
    """Train an arm, and return its figures."""
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        config = _config(args, seed, Path(folder) / "run", "data.size=2000")
        if cache is not None:
            kept = {"kv_cache": CACHES[cache] | {"replay": arm == "replayed"}}
            settings = config.trainer.model_copy(update={"rollout": RolloutSettings.model_validate(kept)})
            config = config.model_copy(update={"trainer": settings})
        tokenizer = load_tokenizer(str(start))
        model = load_model(str(start), dtype=model_dtype(config.model))
        trainer: Any = make_trainer(config, model, tokenizer)
        if arm == "uncorrected":
            trainer.algorithm.objective.correction = Correction("none")
        taken = _recorded(trainer.source)
        steps = [trainer.train_step(step) for step in range(1, args.steps + 1)]
        seconds = time.process_time() - begin
        exact = trainer.held_out.evaluate(make_engine(model, tokenizer, RolloutSettings()), seed=seed)
        own = exact if cache is None else trainer.evaluate()
    tenth = max(1, args.steps // 10)
    return {
        "first": statistics.mean(step["reward"] for step in steps[:tenth]),
        "reward": statistics.mean(step["reward"] for step in steps[-tenth:]),
        "own cache": own.sampled, "exact cache": exact.sampled, "greedy": exact.greedy,
        "gap, first": statistics.mean(step["rollout_gap"] for step in steps[:tenth]),
        "gap, last": statistics.mean(step["rollout_gap"] for step in steps[-tenth:]),
        "tokens": sum(len(c.token_ids) for rollout in taken for c in rollout.completions), "CPU s": seconds,
        "prompts": json_digest([rollout.prompt.token_ids for rollout in taken]),
        "rewards": [step["reward"] for step in steps],
    }  # fmt: skip


def _recorded(source: Any) -> list[Rollout]:
    """Return a list to which the rollouts of every step will be added."""
    taken: list[Rollout] = []
    take = source.take

    def recorded(step: int) -> Any:
        batch = take(step)
        taken.extend(batch.all)
        return batch

    source.take = recorded
    return taken


def _print(name: str, runs: list[dict[str, Any]]) -> None:
    cells = []
    for figure in FIGURES:
        values = [run[figure] for run in runs if figure in run]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 and figure in FIGURES[:5] else ""
        form = ".1e" if figure.startswith("gap") else ",.0f" if figure in FIGURES[-2:] else ".3f"
        cells.append(f"{statistics.mean(values):{form}}{spread}" if values else "")
    print(f"{name:20}" + "".join(f"{cell:>15}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()

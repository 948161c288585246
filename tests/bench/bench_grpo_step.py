"""One GRPO step, ours and TRL's, alternately in one run: seconds a step and peak memory.

    python tests/bench/bench_grpo_step.py [--prompt-tokens 48] [--rounds 2]

Both train SmolLM2-135M-Instruct with LoRA (rank 16, all linear layers) in bfloat16 on the same prompts: 4 prompts x 8
completions x 64 tokens, no reference, one update a batch. Each measurement is a process of its own, so that peak
memory is its own; the first step of each is warm-up and left out. TRL generates with `transformers`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPTS, GROUP, NEW_TOKENS, STEPS = 4, 8, 64, 3
WORDS = ["river", "stone", "paper", "glass", "winter", "summer", "light", "garden", "window", "bridge", "market"]


def rows(prompt_tokens: int) -> list[dict[str, str]]:
    """Distinct prompts of about this many tokens."""
    texts = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(prompt_tokens - 3)) for i in range(16)]
    return [{"prompt": f"{i}: {text}"} for i, text in enumerate(texts)]


def length_reward(completions: list[str], **_: Any) -> list[float]:
    """Something that differs within a group."""
    return [float(len(set(text))) for text in completions]


def ours(prompt_tokens: int) -> list[float]:
    """Seconds of each of our steps."""
    from alignlab import GRPOConfig, GRPOTrainer
    from alignlab.config.model import LoraSettings
    from alignlab.config.rollout import SamplingSettings

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=Path(folder) / "run",
            num_steps=STEPS + 1,
            num_prompts=PROMPTS,
            group_size=GROUP,
            sampling=SamplingSettings(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS),
            trackers=(),
        )
        times = [time.perf_counter()]
        trainer = GRPOTrainer(
            "smollm2-135m-instruct",
            length_reward,
            config,
            rows(prompt_tokens),
            peft_config=LoraSettings(rank=16, alpha=32),
            callbacks=[lambda *_: times.append(time.perf_counter())],
        )
        trainer.train()
        return [b - a for a, b in itertools.pairwise(times[1:])]


def peer(prompt_tokens: int) -> list[float]:
    """Seconds of each of TRL's steps."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from alignlab.models.hub.packaged import resolve_checkpoint

    path = resolve_checkpoint("smollm2-135m-instruct")
    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=PROMPTS * GROUP,
            num_generations=GROUP,
            max_completion_length=NEW_TOKENS,
            generation_kwargs={"min_new_tokens": NEW_TOKENS},
            max_steps=STEPS + 1,
            use_cpu=True,
            bf16=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16),
            reward_funcs=length_reward,
            args=config,
            train_dataset=Dataset.from_list(rows(prompt_tokens)),
            processing_class=AutoTokenizer.from_pretrained(path),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Clock()],
        )
        trainer.train()
    return [b - a for a, b in itertools.pairwise(times)]


def measure(who: str, prompt_tokens: int) -> dict[str, Any]:
    """Run one side in a process of its own."""
    command = [sys.executable, __file__, "--only", who, "--prompt-tokens", str(prompt_tokens)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{who} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=["alignlab", "trl"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        seconds = (ours if options.only == "alignlab" else peer)(options.prompt_tokens)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"seconds": seconds, "peak_gib": round(peak, 2)}))
        return
    results: dict[str, list[dict[str, Any]]] = {"alignlab": [], "trl": []}
    for _ in range(options.rounds):
        for who, found in results.items():
            found.append(measure(who, options.prompt_tokens))
            print(f"{who:9s} {found[-1]}", flush=True)
    step = {who: statistics.median(s for run in found for s in run["seconds"]) for who, found in results.items()}
    peak = {who: max(run["peak_gib"] for run in found) for who, found in results.items()}
    print(
        json.dumps(
            {
                "prompt_tokens": options.prompt_tokens,
                "step_s": {who: round(value, 2) for who, value in step.items()},
                "peak_gib": peak,
                "speedup": round(step["trl"] / step["alignlab"], 2),
                "memory_frac": round(peak["alignlab"] / peak["trl"], 2),
            }
        )
    )


if __name__ == "__main__":
    main()

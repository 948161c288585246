"""PPO's memory and speed with a critic on the policy's base, against a critic that is a copy of the model.

    python tests/bench/bench_ppo.py [--steps 3] [--reward-model runs/reward_smollm2_cpu/adapter]

SmolLM2, LoRA, bfloat16, 4 prompts x 8 completions of 64 tokens, KL to the reference in the reward. Each form runs in a
process of its own: peak memory is the process's. "copies" also holds a copy of the base as the reference, as where
roles share nothing; with a reward model, which is a role on the base otherwise, it holds a copy of that too. Prints a
table, and JSON last.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from typing import Any

FORMS = ("lora", "head", "model", "copies")


def measure(form: str, steps: int, reward_model: str | None) -> dict[str, Any]:
    """Median seconds of a step, and peak memory in GiB."""
    import torch

    from alignlab import LoraSettings, PPOConfig, PPOTrainer
    from alignlab.models.hub.checkpoints import load_model, load_tokenizer

    name = "smollm2-135m-instruct"
    model = load_model(name, dtype=torch.bfloat16)
    held = [copy.deepcopy(model)] if form == "copies" else []
    seconds: list[float] = []

    def noted(trainer: Any, step: int, metrics: dict[str, float]) -> None:
        seconds.append(metrics["generate_s"] + metrics["train_s"])

    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder + "/run", num_steps=steps, num_prompts=4, group_size=8, num_epochs=1,
            sampling={"max_new_tokens": 64}, critic={"form": "model" if form == "copies" else form}, trackers=(),
        )
        rows = [{"prompt": f"Tell me a story about the number {i}, and why it matters to people."} for i in range(8)]
        PPOTrainer(
            model, [make_reward(form, reward_model)], config, rows, tokenizer=load_tokenizer(name),
            peft_config=LoraSettings(rank=16), callbacks=[noted],
        ).train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    del held
    return {"step_s": round(statistics.median(seconds[1:]), 2), "peak_gib": round(peak, 2)}


def make_reward(form: str, folder: str | None) -> Any:
    """The reward model, on the policy's base or, among copies, by itself; or a function."""
    if folder is None:
        return lengths
    from alignlab.scoring.reward_model import ModelReward

    reward = ModelReward(folder)
    if form != "copies":
        return reward

    def own_copy(*, prompt_ids: list[Any], completion_ids: list[Any], **_: Any) -> list[float | None]:
        return reward(prompt_ids=prompt_ids, completion_ids=completion_ids)

    return own_copy


def lengths(*, completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [len(set(ids)) / 64 for ids in completion_ids]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--reward-model", metavar="FOLDER", help="adapter of a reward model of SmolLM2")
    parser.add_argument("--only", choices=FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.steps, options.reward_model)))
        return
    results = {}
    for form in FORMS:
        command = [sys.executable, __file__, "--steps", str(options.steps), "--only", form]
        command += ["--reward-model", options.reward_model] if options.reward_model else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{form} failed:\n{done.stderr[-4000:]}")
        results[form] = json.loads(done.stdout.splitlines()[-1])
        print(f"{form:8s} {results[form]}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()

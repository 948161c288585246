"""Generation and a GRPO step on idle cores and beside busy processes.

    python tests/bench/bench_busy.py [--busy 0 2 3] [--rounds 2] [--only-generate]

SmolLM2-135M-Instruct in bfloat16: tokens a second of the embedded engine for 8 prompts x 8 completions, and seconds of
a GRPO step with LoRA (4 prompts x 8 completions x 32 tokens), as the command line starts it (a short spin of waiting
threads) and as Python does (the library's own spin). `follows` is what users get: the number of threads follows the
free cores. `fixed` has OMP_NUM_THREADS = cores, which keeps the number. A busy process computes without a pause.
Needs idle cores but for those.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m-instruct"
NEW_TOKENS = 32
SETTLING_TOKENS = 8
BUSY = [sys.executable, "-c", "while True: pass"]
ENVIRONMENTS = {
    "command line, follows": {"GOMP_SPINCOUNT": "10000"},
    "command line, fixed": {"GOMP_SPINCOUNT": "10000", "OMP_NUM_THREADS": str(os.cpu_count())},
    "Python, follows": {},
    "Python, fixed": {"OMP_NUM_THREADS": str(os.cpu_count())},
}


def tokens_per_s() -> float:
    """Of the engine, the first call left out, in which the number of threads settles."""
    import torch

    from alignlab.config.rollout import RolloutSettings
    from alignlab.models.hub.checkpoints import load_model, load_tokenizer
    from alignlab.rollout.engine import make_engine
    from alignlab.types import Prompt, SamplingParams

    tokenizer = load_tokenizer(MODEL)
    engine = make_engine(load_model(MODEL, dtype=torch.bfloat16), tokenizer, RolloutSettings())
    texts = [f"Question {i}: what is {i} times {i + 1}?" for i in range(8)]
    prompts = [Prompt(tuple(tokenizer(text)["input_ids"]), text, i) for i, text in enumerate(texts)]
    sampling = SamplingParams(n=8, max_new_tokens=SETTLING_TOKENS, seed=0, ignore_eos=True)
    engine.generate(prompts, sampling)
    start = time.perf_counter()
    rollouts = engine.generate(prompts, replace(sampling, max_new_tokens=NEW_TOKENS))
    num_tokens = sum(len(completion.token_ids) for rollout in rollouts for completion in rollout.completions)
    return num_tokens / (time.perf_counter() - start)


def seconds_per_step() -> float:
    """Of the second GRPO step."""
    from alignlab import GRPOConfig, GRPOTrainer, LoraSettings, SamplingSettings

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text))) for text in completions]

    times = []
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=Path(folder) / "run", num_steps=2, num_prompts=4, group_size=8, trackers=(),
            sampling=SamplingSettings(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS),
        )
        GRPOTrainer(
            MODEL, reward, config, [{"prompt": f"What is {i} times {i + 1}?"} for i in range(8)],
            peft_config=LoraSettings(rank=16, alpha=32), callbacks=[lambda *_: times.append(time.perf_counter())],
        ).train()
    return times[1] - times[0]


MEASURES = {"tokens/s": tokens_per_s, "s a step": seconds_per_step}


def measure(name: str, environment: dict[str, str], num_busy: int) -> float:
    """Measure in a process of its own, beside `num_busy` others."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    others = [subprocess.Popen(BUSY) for _ in range(num_busy)]
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--only", name], capture_output=True, text=True, check=False,
            env=own | {"HF_HUB_OFFLINE": "1"} | environment,
        )
    finally:
        for process in others:
            process.kill()
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-4000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 2, 3], help="busy processes beside each measurement")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only-generate", action="store_true", help="leave out the GRPO step")
    parser.add_argument("--only", choices=list(MEASURES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(MEASURES[options.only]()))
        return
    for measured in list(MEASURES)[: 1 if options.only_generate else 2]:
        for num_busy in options.busy:
            values: dict[str, list[float]] = {name: [] for name in ENVIRONMENTS}
            for _ in range(options.rounds):  # in turns, so that all meet the same machine
                for name, environment in ENVIRONMENTS.items():
                    values[name].append(measure(measured, environment, num_busy))
            for name, runs in values.items():
                print(f"{num_busy} busy  {name:22s} {statistics.median(runs):8.1f} {measured}", flush=True)


if __name__ == "__main__":
    main()

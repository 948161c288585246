"""Every preset on one small task from nothing, with the same budget: does it learn, how fast, with what cache.

    python -m tests.bench.bench_presets [--presets NAME ...] [--warm-steps 500] [--steps 120] [--folder FOLDER]

A model of 4 layers, hidden size 64, learns sums and differences of three digits (configs/grpo_tiny_moe_cpu.yaml with
an easier task, half of the prompts and a lower learning rate) by a warm start of SFT and then by GRPO. A line for each
preset: the fraction of held-out problems answered right, greedy and sampled, before and after GRPO; the mean reward of
the first and last ten steps; the largest gap between engine and trainer, |log-prob|, a mean over a step's tokens;
tokens sampled and trained on in a second, in the fastest tenth of the steps; bytes of cache a token and KiB of state a
sequence in bfloat16. `expert_choice` generates nothing and is not here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from alignlab.models.model_sizes import model_sizes
from alignlab.models.presets import preset_config, preset_names

CONFIG = Path(__file__).parents[2] / "configs" / "grpo_tiny_moe_cpu.yaml"
COLUMNS = (
    "preset", "greedy", "after", "sampled", "after", "reward", "after", "gap", "tokens/s", "cache B", "state KiB"
)  # fmt: skip


def train(preset: str, folder: Path, *, warm_steps: int, steps: int) -> dict[str, Any]:
    """Train a preset; returns the run's summary with its metrics."""
    settings = [
        f"model.architecture={{preset: {preset}}}", f"warm_start.trainer.num_steps={warm_steps}",
        f"trainer.num_steps={steps}", f"trainer.output_dir={folder}", "trainer.trackers=[]",
        "data.task_options={min_terms: 3, max_terms: 3, min_digits: 1, max_digits: 1}",
        "trainer.num_prompts=32", "trainer.optim.learning_rate=3e-4",
    ]  # fmt: skip
    words = [sys.executable, "-m", "alignlab", "train", str(CONFIG), *settings]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{preset} failed:\n{done.stderr[-3000:]}")
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary["steps"] = [line for line in lines if "reward" in line]
    return summary


def row(preset: str, summary: dict[str, Any]) -> tuple[str, ...]:
    """The cells of a preset's line."""
    steps = summary["steps"]
    sizes = model_sizes(preset_config(preset, vocab_size=512))
    rewards = [statistics.mean(line["reward"] for line in part) for part in (steps[:10], steps[-10:])]
    numbers = [summary[when][how] for how in ("greedy", "sampled") for when in ("before", "after")]
    gap = max(line["rollout_gap"] for line in steps)
    speed = statistics.quantiles([line["tokens_per_s"] for line in steps], n=10)[-1]
    return (
        preset, *(f"{number:.2f}" for number in [*numbers, *rewards]), f"{gap:.0e}", f"{speed:,.0f}",
        f"{sizes.cache_bytes_per_token:,}", f"{sizes.state_bytes / 1024:.0f}",
    )  # fmt: skip


def main() -> None:
    """Train, and print a line for each preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in preset_names() if name != "expert_choice"]
    parser.add_argument("--presets", nargs="+", choices=names, default=names)
    parser.add_argument("--warm-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--folder", type=Path, help="for the runs; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
        for preset in args.presets:
            summary = train(preset, folder / preset, warm_steps=args.warm_steps, steps=args.steps)
            print("| " + " | ".join(row(preset, summary)) + " |", flush=True)


if __name__ == "__main__":
    main()

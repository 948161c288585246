"""A small dense model pruned in several ways, and distilled from what it was: accuracy against size.

    python -m tests.bench.bench_pruning [--steps 300] [--warm-steps 600] [--folder FOLDER]

The teacher, 4 layers of hidden size 64, learns sums and differences of three digits by SFT. Each way makes a smaller
model of it, measured on texts of the teacher's own where it measures, which is then distilled from the teacher with
the same budget; zeros stay zeros. A line for each: weights that are not zero, and the fraction of held-out problems
answered right, greedy and sampled, before and after the distillation.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
CHAINS = "data.task_options={min_terms: 3, max_terms: 3, min_digits: 1, max_digits: 1}"
WAYS: dict[str, list[str]] = {
    "magnitude, half": ["prune", "--sparsity", "0.5"],
    "Wanda, half": ["prune", "--sparsity", "0.5", "--method", "wanda"],
    "magnitude, 2:4": ["prune", "--pattern", "2:4"],
    "Wanda, 2:4": ["prune", "--pattern", "2:4", "--method", "wanda"],
    "half of the neurons": ["student", "--intermediate-size", "HALF"],
    "half of the heads": ["student", "--key-value-heads", "1"],
    "3 of 4 layers": ["student", "--num-layers", "3"],
    "2 of 4 layers": ["student", "--num-layers", "2"],
}


def alignlab(*words: str) -> str:
    """Run a command, and return its output."""
    done = subprocess.run([sys.executable, "-m", "alignlab", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"alignlab {words[0]} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def train(config: str, folder: Path, *settings: str) -> dict[str, Any]:
    """Train, and return the run's summary."""
    words = ["train", str(ROOT / "configs" / config), f"trainer.output_dir={folder}", "trainer.trackers=[]", CHAINS]
    summary: dict[str, Any] = json.loads(alignlab(*words, *settings).splitlines()[-1])
    return summary


def num_weights(folder: Path) -> int:
    """Return the weights of a model that are not zero."""
    return sum(int((tensor != 0).sum()) for tensor in load_file(folder / "model.safetensors").values())


def main() -> None:
    """Make the teacher, prune, distil, and print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, help="for the models; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        settings = ["model.architecture={preset: gqa}", f"warm_start.trainer.num_steps={args.warm_steps}"]
        made = train("grpo_tiny_moe_cpu.yaml", folder / "teacher", *settings, "trainer.num_steps=1",
                     "trainer.num_prompts=2", "trainer.optim.warmup_steps=0")  # fmt: skip
        teacher = folder / "teacher" / "warm_start" / "model"
        rows = folder / "rows.jsonl"
        alignlab("sample", str(teacher), "--config", str(ROOT / "configs" / "grpo_tiny_moe_cpu.yaml"), "--output",
                 str(rows), "--set", CHAINS, "--num-prompts", "512", "--num-samples", "1")  # fmt: skip
        print("| | weights | greedy | after | sampled | after |\n|---|---|---|---|---|---|", flush=True)
        greedy, sampled = made["before"]["greedy"], made["before"]["sampled"]
        print(f"| teacher | {num_weights(teacher):,} | {greedy:.2f} | | {sampled:.2f} | |", flush=True)
        half = str(json.loads((teacher / "config.json").read_text(encoding="utf-8"))["intermediate_size"] // 2)
        for number, (way, (command, *options)) in enumerate(WAYS.items()):
            small = folder / f"small-{number}"
            measured = "wanda" in options or "--intermediate-size" in options or "--key-value-heads" in options
            data = ["--data", str(rows), "--calibration-tokens", "4096"] if measured else []
            words = [half if word == "HALF" else word for word in options]
            alignlab(command, str(teacher), str(small), *words, *data)
            summary = train(
                "distill_tiny_cpu.yaml", folder / f"run-{number}", f"model={{name: {small}}}",
                f"trainer.teacher.name={teacher}", f"trainer.num_steps={args.steps}",
                f"trainer.optim.keep_zeros={str(command == 'prune').lower()}",
            )  # fmt: skip
            cells = [f"{summary[when][how]:.2f}" for how in ("greedy", "sampled") for when in ("before", "after")]
            size = num_weights(folder / f"run-{number}" / "model")
            print(f"| {way} | {size:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

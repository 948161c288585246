"""Memory and speed of a process whose cache lies in a file, beside one whose cache lies in memory.

    python -m tests.bench.bench_mapped_cache [--folder /tmp] [--resident-gib 0.03] [--prompts 8] [--length 512]

Each kind runs in a process of its own, which samples completions of distinct prompts, all at once. Prints the size of
the cache, the growth of anonymous memory and of files' memory in the process from before the first step to its peak
(/proc/self/status, looked at every 20 ms), and tokens a second by the process's CPU time, prompts included. Log-probs
of both are compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from alignlab.config.rollout import RolloutSettings
from alignlab.models.hub.checkpoints import load_model, load_tokenizer
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.types import Prompt, SamplingParams

KINDS = ("exact", "mmap")
PARTS = ("RssAnon", "RssFile")
MIB = 2**20


def main() -> None:
    args = _arguments()
    if args.kind is not None:
        print(json.dumps(_measured(args)))
        return
    results = {}
    for kind in KINDS:
        command = [sys.executable, "-m", "tests.bench.bench_mapped_cache", "--kind", kind, *sys.argv[1:]]
        results[kind] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    gap = max(abs(a - b) for a, b in zip(*(results[kind].pop("logprobs") for kind in KINDS), strict=True))
    print(f"{'':8}{'cache, MiB':>12}{'anonymous':>12}{'of files':>12}{'tokens/s':>10}")
    for kind, row in results.items():
        print(f"{kind:8}{row['cache']:12.0f}{row['RssAnon']:12.0f}{row['RssFile']:12.0f}{row['speed']:10.1f}")
    print(f"largest distance of log-probs: {gap:.1e} nats")


def _measured(args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one kind of cache, in MiB, and the log-probs of what it sampled."""
    model, tokenizer = load_model(args.model, dtype=torch.float32), load_tokenizer(args.model)
    cache: dict[str, Any] = {"type": args.kind}
    if args.kind == "mmap":
        cache |= {"folder": args.folder, "resident_gib": args.resident_gib}
    engine = EmbeddedEngine(model, tokenizer, RolloutSettings(kv_cache=cache, prefill_tokens=512))
    page = (Path(__file__).parents[2] / "alignlab/rollout/README.md").read_text("utf-8")
    ids = tokenizer(page)["input_ids"] * 100
    prompts = [Prompt(tuple(ids[i * args.length : (i + 1) * args.length]), "") for i in range(args.prompts)]
    torch.ones(1000, 1000) @ torch.ones(1000, 1000)  # what the first product takes is not the cache's
    before, peaks, done = _resident(), dict.fromkeys(PARTS, 0.0), threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            for part, size in _resident().items():
                peaks[part] = max(peaks[part], size - before[part])

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.process_time()
    rollouts = engine.generate(prompts, SamplingParams(max_new_tokens=args.new_tokens, ignore_eos=True, temperature=0))
    seconds = time.process_time() - start
    done.set()
    watcher.join()
    size = sum(t.nbytes for layer in engine._runner.cache.layers.values() for t in layer.values()) / MIB
    logprobs = [number for rollout in rollouts for number in rollout.completions[0].raw_logprobs]
    num_tokens = args.prompts * (args.length + args.new_tokens)
    return {"cache": size, **peaks, "speed": num_tokens / seconds, "logprobs": logprobs}


def _resident() -> dict[str, float]:
    """Return this process's memory by part, in MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("utf-8").splitlines())
    return {part: int(lines[part].split()[0]) / 1024 for part in PARTS}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="packaged name, Hub id or folder")
    parser.add_argument("--folder", default="/tmp", help="of the file")
    parser.add_argument("--resident-gib", type=float, default=0.03)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=8)
    return parser.parse_args()


if __name__ == "__main__":
    main()

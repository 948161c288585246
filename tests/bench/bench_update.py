"""An update's forward and backward pass by the prompt's length, with attention by compiled kernels and by torch.

    python -m tests.bench.bench_update [--prompts 64 512 2048] [--rounds 3] [--threads 1]

SmolLM2-135M-Instruct in bfloat16 with LoRA (rank 16): one prompt with 8 completions of 64 tokens, packed; the log-probs
of the completions and their gradient. A line for each length: tokens computed in a second of the process's own time, by
kernels and by torch, alternately, the best round of each; and the fraction of the shortest prompt's that is kept.
"""

from __future__ import annotations

import argparse
import time

import torch

from alignlab.config.model import LoraSettings
from alignlab.models.adapters import add_lora
from alignlab.models.hub.checkpoints import load_model
from alignlab.models.native_attention.choice import Mode, set_native_attention
from alignlab.models.policy import Policy
from alignlab.types import Segments

GROUP, COMPLETION = 8, 64
MODES: tuple[Mode, ...] = ("required", "off")


def seconds(policy: Policy, prompt: int) -> float:
    """Seconds of the process's time of one pass, forward and backward."""
    lengths = (prompt,) + (COMPLETION,) * GROUP
    segments = Segments(lengths, (-1,) + (0,) * GROUP, (-1, *range(GROUP)), (0,) * (GROUP + 1))
    tokens = torch.randint(100, 40_000, (segments.num_tokens,), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(segments.num_tokens) >= prompt
    started = time.process_time()
    policy(tokens, segments, mask).logprobs.sum().backward()
    return time.process_time() - started


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = add_lora(load_model("smollm2-135m-instruct", dtype=torch.bfloat16), LoraSettings(rank=16))
    policy = Policy(model).train()
    best: dict[tuple[Mode, int], float] = {}
    for _ in range(args.rounds):
        for prompt in args.prompts:
            for mode in MODES:
                set_native_attention(mode)
                best[mode, prompt] = min(best.get((mode, prompt), float("inf")), seconds(policy, prompt))
    print("| prompt | kernels, tokens/s | kept | torch, tokens/s | kept |\n|---|---|---|---|---|")
    rates = {key: (key[1] + GROUP * COMPLETION) / value for key, value in best.items()}
    for prompt in args.prompts:
        kept = {mode: rates[mode, prompt] / rates[mode, args.prompts[0]] for mode in MODES}
        cells = [f"{rates[mode, prompt]:,.0f} | {kept[mode]:.0%}" for mode in MODES]
        print(f"| {prompt} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

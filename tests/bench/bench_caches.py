"""Caches of the embedded engine: memory, speed, and what an approximation does to log-probs, with and without replay.

    python -m tests.bench.bench_caches [--lengths 512 4096] [--caches NAME ...] [--dtype float32]

Text are this repository's own pages. For each length L and cache: bytes that a sequence of L tokens holds, a token, and
how many tokens of such sequences 1 GiB holds; tokens a second of decoding 8 sequences after a prompt of L tokens that
is known already, by the process's CPU time; and of the log-probs of the last tokens of L, the mean and largest distance
from an exact cache's ("gap"), and from the trainer's forward pass that replays the approximation ("replayed"). Prints a
table, and JSON last.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignlab.config.rollout import RolloutSettings
from alignlab.data.packing import pack_rollouts
from alignlab.models.hub.checkpoints import load_model, load_tokenizer
from alignlab.models.kv_approximation.choice import replayed_approximation
from alignlab.models.policy import Policy
from alignlab.rollout.embedded.block_pools import most_blocks
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.types import Completion, Prompt, Rollout, SamplingParams

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CACHES: dict[str, dict[str, Any]] = {
    "exact": {"type": "exact"}, "int8": {"type": "int8"}, "fp8": {"type": "fp8"}, "int4": {"type": "int4"},
    "window 252 + 4": {"type": "window", "tokens": 252, "sinks": 4},
    "window 1020 + 4": {"type": "window", "tokens": 1020, "sinks": 4},
}
ROWS = 8


def main() -> None:
    args = _arguments()
    model: Any = load_model(args.model, dtype=DTYPES[args.dtype])
    tokenizer = load_tokenizer(args.model)
    pages = sorted(Path(__file__).parents[2].rglob("README.md"))
    ids = tokenizer("\n".join(page.read_text("utf-8") for page in pages))["input_ids"]
    print(f"{args.dtype}, {torch.get_num_threads()} threads, {args.model}")
    print(
        f"{'':24}{'bytes a':>10}{'tokens in':>12}{'tokens/s':>10}{'gap:':>10}{'':>10}{'replayed:':>11}\n"
        f"{'':24}{'token':>10}{'1 GiB':>12}{'':>10}{'mean':>10}{'largest':>10}{'mean':>11}{'largest':>10}"
    )
    results: dict[str, dict[str, float]] = {}
    for length in args.lengths:
        rollout = _rollout(ids[:length], args.scored)
        exact = EmbeddedEngine(model, tokenizer, RolloutSettings()).logprobs([rollout])[0]
        for name in args.caches:
            row = results[f"{length} {name}"] = _measured(model, tokenizer, CACHES[name], rollout, exact, args)
            print(
                f"{f'{length:,}: {name}':24}{row['bytes']:10,.0f}{2**30 / row['bytes']:12,.0f}{row['speed']:10.1f}"
                f"{row['gap_mean']:10.1e}{row['gap_max']:10.1e}{row['replayed_mean']:11.1e}{row['replayed_max']:10.1e}",
                flush=True,
            )
    print(json.dumps({"dtype": args.dtype, "threads": torch.get_num_threads(), "results": results}))


def _measured(
    model: Any, tokenizer: Any, cache: dict[str, Any], rollout: Rollout, exact: Tensor, args: argparse.Namespace
) -> dict[str, float]:
    """Return the figures of one cache at one length."""
    settings = RolloutSettings(kv_cache=cache)
    engine = EmbeddedEngine(model, tokenizer, settings)
    logprobs = engine.logprobs([rollout])[0]
    gap = (logprobs - exact).abs()
    replayed = (logprobs - _replayed(model, rollout, settings)).abs()
    length = len(rollout.prompt.token_ids) + args.scored
    kept = engine._runner.cache
    num_bytes = sum(
        most_blocks(length, window, 1, kept.block_size) * size
        for window, size in kept.block_bytes(DTYPES[args.dtype]).items()
    )
    return {
        "bytes": num_bytes / length, "speed": _speed(engine, rollout.prompt, args.new_tokens),
        "gap_mean": gap.mean().item(), "gap_max": gap.max().item(), "replayed_mean": replayed.mean().item(),
        "replayed_max": replayed.max().item(),
    }


def _replayed(model: Any, rollout: Rollout, settings: RolloutSettings) -> Tensor:
    """Return the trainer's log-probs of the completion, in order."""
    policy = Policy(model, kv_approximation=replayed_approximation(settings)).eval()
    [pack] = pack_rollouts([rollout], budget=1 << 30)
    with torch.no_grad():
        return policy(pack.tokens, pack.segments, pack.completion_mask).logprobs[pack.completion_mask]


def _speed(engine: EmbeddedEngine, prompt: Prompt, new_tokens: int) -> float:
    """Return tokens of decoding a second of CPU time, of sequences whose prompt is in the cache."""
    sampling = SamplingParams(n=ROWS, max_new_tokens=new_tokens, ignore_eos=True)
    engine.generate([prompt], sampling)  # the second call finds the prompt, and room for it
    start = time.process_time()
    engine.generate([prompt], sampling)
    return ROWS * new_tokens / (time.process_time() - start)


def _rollout(ids: list[int], scored: int) -> Rollout:
    return Rollout(Prompt(tuple(ids[:-scored]), ""), (Completion.of(tuple(ids[-scored:])),))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="packaged name, Hub id or folder")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 4096])
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES))
    parser.add_argument("--scored", type=int, default=128, help="tokens at the end whose log-probs are compared")
    parser.add_argument("--new-tokens", type=int, default=32)
    return parser.parse_args()


if __name__ == "__main__":
    main()

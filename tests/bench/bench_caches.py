"""Caches of the embedded engine: memory, speed, and what an approximation does to log-probs, with and without replay.

    python -m tests.bench.bench_caches [--lengths 512 4096] [--caches NAME ...] [--dtype float32]

Prompts are this repository's own pages. For each length L and cache: bytes that a sequence of L tokens holds, a token,
and how many tokens of such sequences 1 GiB holds; tokens a second of decoding 8 sequences after a prompt that is known
already, by the process's CPU time; and the mean and largest distance in nats of the engine's log-probs of 2 sampled
completions, at the end of L tokens, from the trainer's: computed exactly ("gap"), replayed with the engine's record of
its codes ("replayed"), and replayed by the same function without the record. Prints a table, and JSON last.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from alignlab.config.rollout import RolloutSettings
from alignlab.data.packing import pack_rollouts
from alignlab.loop.forward import PolicyForward
from alignlab.models.hub.checkpoints import load_model, load_tokenizer
from alignlab.models.kv_approximation.choice import replayed_approximation
from alignlab.models.policy import Policy
from alignlab.rollout.embedded.block_pools import most_blocks
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.types import Prompt, SamplingParams

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CACHES: dict[str, dict[str, Any]] = {
    "exact": {"type": "exact"}, "int8": {"type": "int8"}, "fp8": {"type": "fp8"}, "int4": {"type": "int4"},
    "window 252 + 4": {"type": "window", "tokens": 252, "sinks": 4},
    "window 1020 + 4": {"type": "window", "tokens": 1020, "sinks": 4},
}
ROWS, SCORED = 8, 2
KINDS = ("gap", "replayed", "no record")


def main() -> None:
    args = _arguments()
    model: Any = load_model(args.model, dtype=DTYPES[args.dtype])
    tokenizer = load_tokenizer(args.model)
    pages = sorted(Path(__file__).parents[2].rglob("README.md"))
    ids = tokenizer("\n".join(page.read_text("utf-8") for page in pages))["input_ids"]
    print(f"{args.dtype}, {torch.get_num_threads()} threads, {args.model}")
    print(
        f"{'':24}{'bytes a':>10}{'tokens in':>12}{'tokens/s':>10}{'gap:':>10}{'':>10}{'replayed:':>11}{'':>10}"
        f"{'no record:':>12}\n{'':24}{'token':>10}{'1 GiB':>12}{'':>10}" + "      mean   largest " * 3
    )
    results: dict[str, dict[str, float]] = {}
    for length in args.lengths:
        prompt = Prompt(tuple(ids[: length - args.new_tokens]), "")
        for name in args.caches:
            row = results[f"{length} {name}"] = _measured(model, tokenizer, CACHES[name], prompt, args)
            gaps = "".join(f"{row[f'{kind} mean']:11.1e}{row[f'{kind} largest']:10.1e}" for kind in KINDS)
            memory = f"{row['bytes']:10,.0f}{2**30 / row['bytes']:12,.0f}"
            print(f"{f'{length:,}: {name}':24}{memory}{row['speed']:10.1f}{gaps}", flush=True)
    print(json.dumps({"dtype": args.dtype, "threads": torch.get_num_threads(), "results": results}))


def _measured(
    model: Any, tokenizer: Any, cache: dict[str, Any], prompt: Prompt, args: argparse.Namespace
) -> dict[str, float]:
    """Return the figures of one cache at one length."""
    settings = RolloutSettings(kv_cache=cache)
    engine = EmbeddedEngine(model, tokenizer, settings)
    sampling = SamplingParams(n=SCORED, max_new_tokens=args.new_tokens, ignore_eos=True, seed=0)
    [pack] = pack_rollouts(engine.generate([prompt], sampling), budget=1 << 30)
    length, kept = len(prompt.token_ids) + args.new_tokens, engine._runner.cache
    num_bytes = sum(
        most_blocks(length, window, 1, kept.block_size) * size
        for window, size in kept.block_bytes(DTYPES[args.dtype]).items()
    )
    result = {"bytes": num_bytes / length, "speed": _speed(engine, prompt, args.new_tokens)}
    approximation = replayed_approximation(settings)
    for kind, policy, record in (
        ("gap", Policy(model), None), ("replayed", Policy(model, kv_approximation=approximation), pack.kv_record),
        ("no record", Policy(model, kv_approximation=approximation), None),
    ):
        with torch.no_grad():
            output = PolicyForward()(policy.eval(), replace(pack, kv_record=record))
        gaps = (output.logprobs - pack.rollout_logprobs)[pack.completion_mask].abs()
        result |= {f"{kind} mean": gaps.mean().item(), f"{kind} largest": gaps.max().item()}
    return result


def _speed(engine: EmbeddedEngine, prompt: Prompt, new_tokens: int) -> float:
    """Return tokens of decoding a second of CPU time, of sequences whose prompt is in the cache."""
    sampling = SamplingParams(n=ROWS, max_new_tokens=new_tokens, ignore_eos=True)
    engine.generate([prompt], sampling)  # the second call finds the prompt, and room for it
    start = time.process_time()
    engine.generate([prompt], sampling)
    return ROWS * new_tokens / (time.process_time() - start)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="packaged name, Hub id or folder")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 4096])
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES))
    parser.add_argument("--new-tokens", type=int, default=64)
    return parser.parse_args()


if __name__ == "__main__":
    main()

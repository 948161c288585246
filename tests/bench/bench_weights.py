"""Rounded weights of the embedded engine: speed, memory, error, and the time of rounding.

    python -m tests.bench.bench_weights [--steps native python] [--kinds NAME ...] [--batches 1 16 64] [--rounds 2]
    python -m tests.bench.bench_weights --products

For each rounding and step: seconds of rounding the policy after an update; bytes of the copies that the engine samples
from; tokens a second of decoding 1, 16 and 64 completions after a prompt that is known already, by the process's CPU
time, the best of some rounds in which the engines take turns; and the mean and largest distance in nats of the engine's
log-probs of 512 sampled tokens from the trainer's, which computes with the policy's own weights, and the mean of
trainer - engine with its sign. Prints a table, and JSON last.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from alignlab.config.rollout import RolloutSettings
from alignlab.models.hub.checkpoints import load_model, load_tokenizer
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.rollout.embedded.native.binding import kernels_of
from alignlab.rollout.embedded.native.packing import Packer
from alignlab.rollout.embedded.native.weights import NativeWeights
from alignlab.rollout.embedded.rounding import Rounding
from alignlab.rollout.verification import trainer_logprobs
from alignlab.types import Prompt, SamplingParams

KINDS: dict[str, Any] = {
    "bfloat16": None, "int8": "int8", "int8, head too": {"type": "int8", "exact": []}, "int4": "int4",
    "int4, groups of 64": {"type": "int4", "group": 64}, "int8_dynamic": "int8_dynamic",
    "int8_dynamic but for down": {"type": "int8_dynamic", "exact": ["lm_head", "down_proj"]},
}  # fmt: skip
STEPS = {"native": "required", "python": "off"}
PROMPT, SCORED = 48, 16


def main() -> None:
    args = _arguments()
    if args.products:
        for name, of_rows in time_products([1, 2, 4, 8, 16, 64, 256]).items():
            print(f"{name:14}" + "".join(f"{count:>6}:{value:7.2f}" for count, value in of_rows.items()))
        return
    model: Any = load_model(args.model, dtype=torch.bfloat16)
    tokenizer = load_tokenizer(args.model)
    pages = sorted(Path(__file__).parents[2].rglob("README.md"))
    ids = tokenizer("\n".join(page.read_text("utf-8") for page in pages))["input_ids"]
    prompts = [Prompt(tuple(ids[n * 97 : n * 97 + PROMPT]), "") for n in range(SCORED)]
    print(f"{torch.get_num_threads()} threads, {args.model}")
    engines: dict[str, EmbeddedEngine] = {}
    results: dict[str, dict[str, float]] = {}
    for step in args.steps:
        for name in args.kinds:
            settings = RolloutSettings.model_validate({"quantization": KINDS[name], "native": STEPS[step]})
            engine = engines[f"{step}: {name}"] = EmbeddedEngine(model, tokenizer, settings)
            row = results[f"{step}: {name}"] = _error(engine, model, prompts, args.new_tokens) | _copies(engine, model)
            print(f"{step}: {name}: {row}", flush=True)
    for _ in range(args.rounds):
        for batch in args.batches:
            for name, engine in engines.items():
                speed = _speed(engine, prompts[0], batch, args.new_tokens)
                results[name][f"speed {batch}"] = max(speed, results[name].get(f"speed {batch}", 0.0))
    batches = "".join(f"{batch:>8}" for batch in args.batches)
    print(f"{'':34}{'rounding s':>11}{'MB':>7}{batches}   mean  largest   bias")
    for name, row in results.items():
        speeds = "".join(f"{row[f'speed {batch}']:8.0f}" for batch in args.batches)
        errors = f"{row['mean']:7.3f}{row['largest']:9.2f}{row['bias']:7.3f}"
        print(f"{name:34}{row['rounding_s']:11.2f}{row['bytes'] / 1e6:7.0f}{speeds}{errors}")
    print(json.dumps(results))


PRODUCTS = ((960, 576), (576, 576), (3072, 576), (576, 1536))
"""Outputs and inputs of the products of a layer of SmolLM2-135M, of which there are 30."""


def time_products(row_counts: list[int], rounds: int = 7) -> dict[str, dict[int, float]]:
    """Return the milliseconds of CPU time of the kernels' products of all layers, by rounding and rows."""
    kernels, seen = kernels_of(torch.bfloat16), {}
    for name in ("bfloat16", "int8", "int4", "int8_dynamic"):
        settings = RolloutSettings.model_validate({"quantization": KINDS[name]}).quantization
        packer = Packer(kernels, lambda module: module, settings and Rounding(settings, frozenset()))
        weights = [torch.randn(shape).mul_(0.02).bfloat16() for _ in range(30) for shape in PRODUCTS]
        seen[name] = [packer.stacked([weight], rounded=settings is not None) for weight in weights]
    times: dict[str, dict[int, float]] = {name: dict.fromkeys(row_counts, float("inf")) for name in seen}
    for count in row_counts:
        rows = {size: torch.randn(count, size).bfloat16() for size in (576, 1536)}
        for _ in range(rounds):
            for name, packed in seen.items():
                start = time.process_time()
                for weight, (_, size) in zip(packed, PRODUCTS * 30, strict=True):
                    kernels.product(rows[size], weight)
                times[name][count] = min(times[name][count], 1e3 * (time.process_time() - start))
    return times


def _error(engine: EmbeddedEngine, model: Any, prompts: list[Prompt], new_tokens: int) -> dict[str, float]:
    """Return the distance of the trainer's log-probs from the engine's over sampled tokens."""
    rollouts = engine.generate(prompts, SamplingParams(max_new_tokens=new_tokens, ignore_eos=True, seed=0))
    reported = torch.cat([torch.tensor(c.raw_logprobs) for rollout in rollouts for c in rollout.completions])
    gaps = torch.cat(trainer_logprobs(model, rollouts)) - reported
    return {"mean": gaps.abs().mean().item(), "largest": gaps.abs().max().item(), "bias": gaps.mean().item()}


def _copies(engine: EmbeddedEngine, model: Any) -> dict[str, float]:
    """Return the time of rounding the policy by the process's CPU time, and the bytes of the engine's copies."""
    weights = engine._weights
    start = time.process_time()
    engine.update_weights(engine.policy_version + 1)
    if isinstance(weights, NativeWeights):
        num_bytes = weights.packed.num_bytes
    else:
        layers = [copy for *_, copy in weights._copies] + ([weights._head_copy] if weights._head_copy else [])
        num_bytes = sum(value.nbytes for layer in layers for value in vars(layer).values() if torch.is_tensor(value))
    return {"rounding_s": time.process_time() - start, "bytes": num_bytes}


def _speed(engine: EmbeddedEngine, prompt: Prompt, batch: int, new_tokens: int) -> float:
    """Return tokens of decoding a second of CPU time, of completions whose prompt is in the cache."""
    sampling = SamplingParams(n=batch, max_new_tokens=new_tokens, ignore_eos=True)
    engine.generate([prompt], SamplingParams(n=batch, max_new_tokens=1))
    start = time.process_time()
    engine.generate([prompt], sampling)
    return batch * new_tokens / (time.process_time() - start)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="packaged name, Hub id or folder")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--products", action="store_true", help="time the kernels' products alone, in milliseconds")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()

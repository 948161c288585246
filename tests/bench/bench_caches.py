"""Caches of the embedded engine: memory, speed, and what an approximation does to log-probs, with and without replay.

    python -m tests.bench.bench_caches [--lengths 512 4096 16384] [--caches NAME_OR_SETTINGS ...] [--dtype float32]

Prompts are this repository's own pages. For each length L and cache: bytes that a sequence of L tokens holds, a token,
and how many tokens of such sequences 1 GiB holds; tokens a second of decoding 8 sequences after a common prompt, by the
process's CPU time; and the mean and largest distance in nats of the log-probs of the sampled tokens, at the end of L
tokens, from those that an engine with an exact cache gives the same tokens ("gap"). At the lengths of `--replay` also
from the trainer's, replayed with the engine's record of its codes ("replayed"), and by the same function without the
record. A prompt is computed once a cache. A cache is one of the names below, or settings of `rollout.kv_cache` as YAML,
such as "{type: int4, group: 64}". For more tokens than a model is made for its positions are extended, without more
training: log-probs of such places say what a cache does, and little about the model. Prints a table, and JSON last.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from alignlab.config.rollout import RolloutSettings
from alignlab.data.packing import pack_rollouts
from alignlab.loop.forward import PolicyForward
from alignlab.models.hub.checkpoints import load_model, load_tokenizer
from alignlab.models.kv_approximation.choice import replayed_approximation
from alignlab.models.policy import Policy
from alignlab.models.sink_window import KeptTokens, Window
from alignlab.rollout.embedded.block_pools import most_blocks
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.types import Prompt, Rollout, SamplingParams

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CACHES: dict[str, dict[str, Any]] = {
    "exact": {"type": "exact"}, "int8": {"type": "int8"}, "fp8": {"type": "fp8"}, "int4": {"type": "int4"},
    "window 252 + 4": {"type": "window", "tokens": 252, "sinks": 4},
    "window 1020 + 4": {"type": "window", "tokens": 1020, "sinks": 4},
    "mmap": {"type": "mmap", "folder": tempfile.gettempdir()},
}
ROWS, REPLAYED = 8, 2
KINDS = ("gap", "replayed", "no record")


def main() -> None:
    args = _arguments()
    model: Any = load_model(args.model, dtype=DTYPES[args.dtype])
    tokenizer = load_tokenizer(args.model)
    made_for = model.config.max_position_embeddings
    model.config.max_position_embeddings = max(made_for, *args.lengths)
    pages = sorted(Path(__file__).parents[2].rglob("*.md"))
    ids = tokenizer("\n".join(page.read_text("utf-8") for page in pages))["input_ids"]
    assert len(ids) >= max(args.lengths), f"the pages have {len(ids)} tokens"
    print(f"{args.dtype}, {torch.get_num_threads()} threads, {args.model}, made for {made_for} tokens")
    print(
        f"{'':32}{'bytes a':>10}{'tokens in':>12}{'tokens/s':>10}{'gap:':>10}{'':>10}{'replayed:':>11}{'':>10}"
        f"{'no record:':>12}\n{'':32}{'token':>10}{'1 GiB':>12}{'':>10}" + "      mean   largest " * 3
    )
    results: dict[str, dict[str, float]] = {}
    for length in args.lengths:
        prompt = Prompt(tuple(ids[: length - args.new_tokens]), "")
        exact = EmbeddedEngine(model, tokenizer, RolloutSettings())
        for name in args.caches:
            row = results[f"{length} {name}"] = _measured(model, exact, _settings(name), prompt, args)
            gaps = "".join(f"{row[f'{k} mean']:11.1e}{row[f'{k} largest']:10.1e}" for k in KINDS if f"{k} mean" in row)
            memory = f"{row['bytes']:10,.0f}{2**30 / row['bytes']:12,.0f}"
            print(f"{f'{length:,}: {name}':32}{memory}{row['speed']:10.1f}{gaps}", flush=True)
    print(json.dumps({"dtype": args.dtype, "threads": torch.get_num_threads(), "results": results}))


def _settings(cache: str) -> RolloutSettings:
    """Return the settings of a cache: one of `CACHES`, or YAML."""
    return RolloutSettings(kv_cache=yaml.safe_load(cache) if cache.startswith("{") else CACHES[cache])


def _measured(
    model: Any, exact: EmbeddedEngine, settings: RolloutSettings, prompt: Prompt, args: argparse.Namespace
) -> dict[str, float]:
    """Return the figures of one cache at one length."""
    is_exact = settings.kv_cache.type == "exact"
    engine = exact if is_exact else EmbeddedEngine(model, exact._tokenizer, settings)
    [rollout], speed = _decoded(engine, prompt, args.new_tokens)
    length, kept = len(prompt.token_ids) + args.new_tokens, engine._runner.cache
    num_bytes = sum(
        _held_blocks(window, length, len(prompt.token_ids), kept.block_size) * size
        for window, size in kept.block_bytes(DTYPES[args.dtype]).items()
    )
    result = {"bytes": num_bytes / length, "speed": speed}
    result |= _distance("gap", torch.cat(exact.logprobs([rollout])), rollout)
    return result | (_replayed(model, settings, rollout) if len(prompt.token_ids) < args.replay else {})


def _held_blocks(window: Window, length: int, num_prompt: int, block_size: int) -> int:
    """Return the blocks of a pool that a sequence holds at the end of its completion."""
    if isinstance(window, KeptTokens):
        return -(-window.most_kept(length, num_prompt) // block_size)
    return most_blocks(length, window, 1, block_size)


def _decoded(engine: EmbeddedEngine, prompt: Prompt, new_tokens: int) -> tuple[list[Rollout], float]:
    """Return completions of a prompt, and the tokens a second of CPU time of all but the first of each."""
    times: list[tuple[float, int]] = []
    rollouts = engine.generate(
        [prompt], SamplingParams(n=ROWS, max_new_tokens=new_tokens, ignore_eos=True, seed=0),
        on_step=lambda num_tokens, _: times.append((time.process_time(), num_tokens)),
    )
    start, first = next((moment, count) for moment, count in times if count)
    end, last = times[-1]
    return rollouts, (last - first) / (end - start)


def _replayed(model: Any, settings: RolloutSettings, rollout: Rollout) -> dict[str, float]:
    """Return the distances of the trainer's log-probs, replayed with the record and without it."""
    rollout = replace(rollout, completions=rollout.completions[:REPLAYED])
    policy = Policy(model, kv_approximation=replayed_approximation(settings, model)).eval()
    [pack] = pack_rollouts([rollout], budget=1 << 30)
    result = {}
    for kind, record in (("replayed", pack.kv_record), ("no record", None)):
        with torch.no_grad():
            output = PolicyForward()(policy, replace(pack, kv_record=record))
        result |= _distance(kind, output.logprobs[pack.completion_mask], rollout)
    return result


def _distance(kind: str, logprobs: Tensor, rollout: Rollout) -> dict[str, float]:
    """Return the mean and the largest distance of log-probs from those that a rollout was sampled with."""
    sampled = torch.tensor([number for completion in rollout.completions for number in completion.raw_logprobs])
    gaps = (logprobs - sampled).abs()
    return {f"{kind} mean": gaps.mean().item(), f"{kind} largest": gaps.max().item()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="packaged name, Hub id or folder")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 4096, 16384])
    parser.add_argument("--caches", nargs="+", default=list(CACHES), help=f"settings as YAML, or of {list(CACHES)}")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--replay", type=int, default=512, help="replay lengths up to this one; 0 for none")
    return parser.parse_args()


if __name__ == "__main__":
    main()

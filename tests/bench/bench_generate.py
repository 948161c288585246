"""Generation speed: the embedded engine, vLLM and `transformers`' generate, alternately in one run.

    python -m tests.bench.bench_generate [--engines embedded vllm vllm_server transformers]

Same weights, prompts, lengths, threads and precision; sampled at temperature 1, no early end. Rounds alternate between
the engines, and the medians are compared with the last one's. Prints a table, and a JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from alignlab.config.rollout import RolloutSettings, VLLMSettings
from alignlab.models.hub.checkpoints import load_model, load_tokenizer
from alignlab.models.hub.packaged import resolve_checkpoint
from alignlab.rollout.engine import RolloutEngine, make_engine
from alignlab.types import Prompt, SamplingParams
from tests.bench.servers import served

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    name: str
    num_prompts: int
    group_size: int
    prompt_tokens: int


Engine = Callable[[torch.Tensor, Case], None]
ENGINES = ("embedded", "vllm", "vllm_server", "transformers")
CASES = (
    Case("batch 16", 16, 1, 48), Case("batch 64", 64, 1, 48),
    Case("groups 8 x 8", 8, 8, 48), Case("512-token prompt, group of 8", 1, 8, 512),
)


def main() -> None:
    args = _arguments()
    model, tokenizer = load_model(args.model, dtype=DTYPES[args.dtype]), load_tokenizer(args.model)
    makers: dict[str, Callable[[], Engine]] = {
        "embedded": lambda: _ours(make_engine(model, tokenizer, RolloutSettings()), args.new_tokens),
        "vllm": lambda: _ours(make_engine(model, tokenizer, VLLMSettings(cache_gib=2, block_size=32)), args.new_tokens),
        "transformers": lambda: _peer(args),
    }
    with ExitStack() as stack:
        if "vllm_server" in args.engines:
            server = stack.enter_context(served(model, tokenizer, cache_gib=2, block_size=32))
            makers["vllm_server"] = lambda: _ours(server, args.new_tokens)
        _compare({name: makers[name]() for name in args.engines}, args)


def _compare(engines: dict[str, Engine], args: argparse.Namespace) -> None:
    print(f"{args.dtype}, {torch.get_num_threads()} threads, {args.new_tokens} new tokens, {args.rounds} rounds")
    print(f"{'tokens/s':30}" + "".join(f"{name:>14}" for name in engines) + f"{'ratio':>8}")
    results = {}
    for case in CASES:
        if args.only is None or args.only in case.name:
            speeds = results[case.name] = _race(case, engines, args)
            ratio = speeds[args.engines[0]] / speeds[args.engines[-1]]
            print(f"{case.name:30}" + "".join(f"{v:14.0f}" for v in speeds.values()) + f"{ratio:8.2f}", flush=True)
    print(json.dumps({"dtype": args.dtype, "threads": torch.get_num_threads(), "results": results}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="packaged name, Hub id or folder")
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=["embedded", "transformers"]
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--cpu-time", action="store_true", help="of the process, for one thread on a machine that others use"
    )
    parser.add_argument("--only", help="cases whose name holds this")
    return parser.parse_args()


def _race(case: Case, engines: dict[str, Engine], args: argparse.Namespace) -> dict[str, float]:
    """Median tokens a second of each, after one round that is not counted."""
    num_tokens = case.num_prompts * case.group_size * args.new_tokens
    times: dict[str, list[float]] = {name: [] for name in engines}
    clock = time.process_time if args.cpu_time else time.perf_counter
    for round_number in range(args.rounds + 1):
        ids = torch.randint(5, 40_000, (case.num_prompts, case.prompt_tokens))  # new ones: no prefix is known already
        for name, engine in engines.items():
            start = clock()
            engine(ids, case)
            if round_number:
                times[name].append(clock() - start)
    return {name: num_tokens / statistics.median(seconds) for name, seconds in times.items()}


def _ours(engine: RolloutEngine, new_tokens: int) -> Engine:
    def run(ids: torch.Tensor, case: Case) -> None:
        prompts = [Prompt(tuple(row), "") for row in ids.tolist()]
        engine.generate(prompts, SamplingParams(n=case.group_size, max_new_tokens=new_tokens, ignore_eos=True))

    return run


def _peer(args: argparse.Namespace) -> Engine:
    path = resolve_checkpoint(args.model)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[args.dtype]).eval()

    def run(ids: torch.Tensor, case: Case) -> None:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens, num_return_sequences=case.group_size,
            pad_token_id=2,
        )

    return run


if __name__ == "__main__":
    main()

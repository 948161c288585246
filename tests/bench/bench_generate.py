"""Generation speed: the embedded engine, vLLM and `transformers`' generate, alternately in one run.

    python -m tests.bench.bench_generate [--engines native python vllm_compiled transformers]

Same weights, prompts, lengths, threads and precision; sampled at temperature 1, no early end. Rounds alternate between
the engines, and the median of the first is compared with that of each other. Prints a table, and a JSON line last.

`embedded` is the embedded engine as its settings choose, `native` and `python` with either step; `vllm` is vLLM as it
runs here by default, without compilation, and `vllm_compiled` with it. One run has one of these two: vLLM is one
engine in a process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from alignlab.config.rollout import EngineSettings, RolloutSettings, VLLMSettings
from alignlab.models.hub.checkpoints import load_model, load_tokenizer
from alignlab.models.hub.export import Model
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
ENGINES = ("embedded", "native", "python", "vllm", "vllm_compiled", "vllm_server", "transformers")
CASES = (
    Case("batch 1", 1, 1, 48), Case("batch 16", 16, 1, 48), Case("batch 64", 64, 1, 48),
    Case("groups 8 x 8", 8, 8, 48), Case("512-token prompt, group of 8", 1, 8, 512),
)


def main() -> None:
    args = _arguments()
    model, tokenizer = load_model(args.model, dtype=DTYPES[args.dtype]), load_tokenizer(args.model)
    settings: dict[str, EngineSettings] = {
        "embedded": RolloutSettings(), "native": RolloutSettings(native="required"),
        "python": RolloutSettings(native="off"), "vllm": VLLMSettings(cache_gib=2, block_size=32),
        "vllm_compiled": VLLMSettings(cache_gib=2, block_size=32, eager=False),
    }
    makers: dict[str, Callable[[], Engine]] = {"transformers": lambda: _peer(args)}
    for name, chosen in settings.items():
        makers[name] = partial(_made, model, tokenizer, chosen, args.new_tokens)
    with ExitStack() as stack:
        if "vllm_server" in args.engines:
            server = stack.enter_context(served(model, tokenizer, cache_gib=2, block_size=32))
            makers["vllm_server"] = lambda: _ours(server, args.new_tokens)
        _compare({name: makers[name]() for name in args.engines}, args)


def _compare(engines: dict[str, Engine], args: argparse.Namespace) -> None:
    print(f"{args.dtype}, {torch.get_num_threads()} threads, {args.new_tokens} new tokens, {args.rounds} rounds")
    print(f"{'tokens/s':30}" + "".join(f"{name:>14}" for name in engines) + "  first / each other")
    results = {}
    for case in CASES:
        if args.only is None or args.only in case.name:
            speeds = results[case.name] = _race(case, engines, args)
            first, *others = speeds.values()
            ratios = "".join(f"{first / other:8.2f}" for other in others)
            print(f"{case.name:30}" + "".join(f"{v:14.0f}" for v in speeds.values()) + ratios, flush=True)
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


def _made(model: Model, tokenizer: Any, settings: EngineSettings, new_tokens: int) -> Engine:
    return _ours(make_engine(model, tokenizer, settings), new_tokens)


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

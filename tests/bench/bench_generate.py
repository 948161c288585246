"""Generation speed: our engine and `transformers`' generate, alternately in one run.

    python -m tests.bench.bench_generate --model smollm2-135m-instruct

Same weights, prompts, lengths, threads and precision; sampled at temperature 1, no early end. Rounds alternate between
the two, and the medians are compared. Prints a table, and a JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from alignlab.config.rollout import RolloutSettings
from alignlab.models.checkpoints import load_model, load_tokenizer
from alignlab.models.packaged import resolve_checkpoint
from alignlab.rollout.engine import EmbeddedEngine
from alignlab.types import Prompt, SamplingParams

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    name: str
    num_prompts: int
    group_size: int
    prompt_tokens: int


CASES = (
    Case("batch 16", 16, 1, 48), Case("batch 64", 64, 1, 48),
    Case("groups 8 x 8", 8, 8, 48), Case("512-token prompt, group of 8", 1, 8, 512),
)


def main() -> None:
    args = _arguments()
    ours = EmbeddedEngine(
        load_model(args.model, dtype=DTYPES[args.dtype]), load_tokenizer(args.model), RolloutSettings()
    )
    peer = AutoModelForCausalLM.from_pretrained(resolve_checkpoint(args.model), dtype=DTYPES[args.dtype]).eval()
    print(f"{args.dtype}, {torch.get_num_threads()} threads, {args.new_tokens} new tokens, {args.rounds} rounds")
    print(f"{'':30}{'ours tok/s':>12}{'peer tok/s':>12}{'ratio':>8}")
    results = {}
    for case in CASES:
        if args.only is None or args.only in case.name:
            speeds = _race(case, ours, peer, args)
            results[case.name] = speeds
            print(f"{case.name:30}{speeds['ours']:12.0f}{speeds['peer']:12.0f}{speeds['ratio']:8.2f}", flush=True)
    print(json.dumps({"dtype": args.dtype, "threads": torch.get_num_threads(), "results": results}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="packaged name, Hub id or folder")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--cpu-time", action="store_true", help="of the process, for one thread on a machine that others use"
    )
    parser.add_argument("--only", help="cases whose name holds this")
    return parser.parse_args()


def _race(case: Case, ours: EmbeddedEngine, peer: PreTrainedModel, args: argparse.Namespace) -> dict[str, float]:
    """Median tokens a second of both, after one round that is not counted."""
    num_tokens = case.num_prompts * case.group_size * args.new_tokens
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for round_number in range(args.rounds + 1):
        ids = torch.randint(5, 40_000, (case.num_prompts, case.prompt_tokens))  # new ones: no prefix is known already
        clock = time.process_time if args.cpu_time else time.perf_counter
        marks = [clock()]
        _ours(ours, ids, case, args.new_tokens)
        marks.append(clock())
        _peer(peer, ids, case, args.new_tokens)
        marks.append(clock())
        if round_number:
            times["ours"].append(marks[1] - marks[0])
            times["peer"].append(marks[2] - marks[1])
    speeds = {name: num_tokens / statistics.median(seconds) for name, seconds in times.items()}
    return {**speeds, "ratio": speeds["ours"] / speeds["peer"]}


def _ours(engine: EmbeddedEngine, ids: torch.Tensor, case: Case, new_tokens: int) -> None:
    prompts = [Prompt(tuple(row), "") for row in ids.tolist()]
    engine.generate(prompts, SamplingParams(n=case.group_size, max_new_tokens=new_tokens, ignore_eos=True))


def _peer(model: Any, ids: torch.Tensor, case: Case, new_tokens: int) -> None:
    model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, num_return_sequences=case.group_size, pad_token_id=2,
    )


if __name__ == "__main__":
    main()

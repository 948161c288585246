"""Speed of drafts in the embedded engine: without, n-grams where they pay, n-grams always; alternately in one run.

    OMP_NUM_THREADS=1 python -m tests.bench.bench_speculation [--texts copies] [--batches 1 4 16]

Same prompts, seeds and completions with all three; CPU time of the process. Texts that repeat: the model is asked to
copy a list, greedily. Texts that do not: open questions, sampled. Prints a table, and a JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from alignlab.config.rollout import RolloutSettings
from alignlab.models.hub.checkpoints import load_model, load_tokenizer
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.types import Prompt, SamplingParams

LIST = "\n".join(
    f"{number}. The {colour} {thing} costs {number * 7} dollars."
    for number, (colour, thing) in enumerate(
        [("red", "lamp"), ("blue", "chair"), ("green", "table"), ("white", "shelf"), ("black", "desk")], start=1
    )
)
TEXTS = {
    "copies": ([f"Repeat this list word for word:\n{LIST}"], {"temperature": 0.0}),
    "sums": ([f"What is {n} + {n + 4}? Show every step." for n in range(11, 27)], {"temperature": 1.0}),
    "questions": (
        [f"Tell me a short story about {hero}." for hero in ("a cat", "the sea", "a king", "two friends")],
        {"temperature": 1.0},
    ),
}
KINDS: dict[str, Any] = {
    "without": None, "ngram": {"type": "ngram"}, "ngram always": {"type": "ngram", "always": True},
}  # fmt: skip


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="packaged name, Hub id or folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--texts", choices=tuple(TEXTS), nargs="+", default=list(TEXTS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--num-drafts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model = load_model(args.model, dtype=getattr(torch, args.dtype))
    tokenizer = load_tokenizer(args.model)
    print(f"{args.dtype}, {torch.get_num_threads()} threads, {args.new_tokens} new tokens, {args.num_drafts} drafts")
    print(f"{'tokens a CPU second':24}" + "".join(f"{kind:>16}" for kind in KINDS) + f"{'kept':>8}{'steps':>8}")
    results = {}
    for name in args.texts:
        texts, sampling = TEXTS[name]
        for batch in args.batches:
            row = measured(model, tokenizer, [texts[i % len(texts)] for i in range(batch)], sampling, args)
            results[f"{name}, batch {batch}"] = row
            speeds = "".join(f"{row[kind]:16.1f}" for kind in KINDS)
            print(f"{name + ', batch ' + str(batch):24}{speeds}{row['kept']:8.2f}{row['steps']:8.2f}", flush=True)
    print(json.dumps(results))


def measured(model: Any, tokenizer: Any, texts: list[str], sampling: dict[str, Any], args: Any) -> dict[str, float]:
    """Return the median speeds, the drafts kept of those always offered, and the steps with drafts where they pay."""
    prompts = [
        Prompt(tuple(tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )), text)
        for text in texts
    ]  # fmt: skip
    engines = {}
    for kind, chosen in KINDS.items():
        drafts = chosen and chosen | {"num_drafts": args.num_drafts}
        engines[kind] = EmbeddedEngine(model, tokenizer, RolloutSettings.model_validate({"speculation": drafts}))
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    params = SamplingParams(max_new_tokens=args.new_tokens, ignore_eos=True, seed=0, **sampling)
    for number in range(args.rounds + 1):
        for kind, engine in engines.items():
            start = time.process_time()
            engine.generate(prompts, params)
            if number:
                times[kind].append(time.process_time() - start)
    num_tokens = len(texts) * args.new_tokens
    speeds = {kind: num_tokens / statistics.median(seconds) for kind, seconds in times.items()}
    return speeds | {
        "kept": engines["ngram always"].metrics()["engine/draft_acceptance"],
        "steps": engines["ngram"].metrics()["engine/draft_steps_frac"],
    }


if __name__ == "__main__":
    main()

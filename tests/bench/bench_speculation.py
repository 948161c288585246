"""Speed of drafts in the embedded engine: without, where they pay, and always; alternately in one run.

    OMP_NUM_THREADS=1 python -m tests.bench.bench_speculation [--drafts ngram model] [--texts copies] [--batches 1 4 16]
    OMP_NUM_THREADS=1 python -m tests.bench.bench_speculation --drafts mtp [--native off]

Same prompts, seeds and completions with all of them; CPU time of the process. Texts that repeat: the model is asked to
copy a list, greedily. Texts that do not: open questions, sampled. `model` drafts by a student of some layers of the
model, which is first trained on the model's own answers to other texts (`--draft-layers`, `--draft-steps`; or
`--draft-model FOLDER`). `mtp` measures a tiny model instead, trained from nothing to count on together with its layer
for multi-token prediction. Prints a table, and a JSON line last: kept is the part of the drafts of "always" that the
policy drew too, steps the part of decoding steps with drafts where they are made by what they gain.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from alignlab.config.rollout import RolloutSettings
from alignlab.models.hub.checkpoints import load_model, load_tokenizer
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.types import Prompt, SamplingParams
from tests.bench.drafting_models import make_counter, make_student

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
NUMBERS = "numbers"
COLUMN = 16


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="packaged name, Hub id or folder")
    parser.add_argument("--drafts", choices=("ngram", "model", "mtp"), nargs="+", default=["ngram"])
    parser.add_argument("--draft-model", help="of the same tokenizer; default: a student is made")
    parser.add_argument("--draft-layers", type=int, default=4)
    parser.add_argument("--draft-steps", type=int, default=60, help="of training: the student, or the tiny model")
    parser.add_argument("--preset", default="gqa", help="kinds of layers of the tiny model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--native", choices=("auto", "required", "off"), default="auto")
    parser.add_argument("--texts", choices=tuple(TEXTS), nargs="+", default=list(TEXTS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--num-drafts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if "mtp" in args.drafts and len(args.drafts) > 1:
        parser.error("--drafts mtp measures a model of its own: give it alone")
    with tempfile.TemporaryDirectory() as folder:
        name, texts = args.model, {text: TEXTS[text] for text in args.texts}
        if args.drafts == ["mtp"]:
            path, prompts = make_counter(Path(folder) / "tiny", num_steps=args.draft_steps, preset=args.preset)
            name, texts = str(path), {NUMBERS: (prompts, {"temperature": 1.0})}
        elif "model" in args.drafts and args.draft_model is None:
            args.draft_model = str(make_student(
                name, Path(folder) / "student", num_layers=args.draft_layers, num_steps=args.draft_steps, new_tokens=64
            ))  # fmt: skip
        _measure(name, texts, args)


def _measure(name: str, texts: dict[str, tuple[list[str], dict[str, Any]]], args: argparse.Namespace) -> None:
    """Measure a model on texts, and print."""
    model = load_model(name, dtype=getattr(torch, args.dtype), mtp=args.drafts == ["mtp"])
    tokenizer = load_tokenizer(name)
    kinds = _kinds(args)
    print(f"{args.dtype}, {torch.get_num_threads()} threads, {args.new_tokens} new tokens, {args.num_drafts} drafts")
    kept = "".join(f"{'kept':>8}{'steps':>8}" for _ in args.drafts)
    print(f"{'tokens a CPU second':24}" + "".join(f"{kind:>{COLUMN}}" for kind in kinds) + kept)
    results = {}
    for of_kind, (prompts, sampling) in texts.items():
        for batch in args.batches:
            chosen = [prompts[i % len(prompts)] for i in range(batch)]
            row = measured(model, tokenizer, chosen, sampling, kinds, args)
            results[f"{of_kind}, batch {batch}"] = row
            speeds = "".join(f"{row[kind]:{COLUMN}.1f}" for kind in kinds)
            kept = "".join(f"{row[f'{d} kept']:8.2f}{row[f'{d} steps']:8.2f}" for d in args.drafts)
            print(f"{of_kind + ', batch ' + str(batch):24}{speeds}{kept}", flush=True)
    print(json.dumps(results))


def _kinds(args: argparse.Namespace) -> dict[str, Any]:
    """Return settings of `rollout.speculation` by the name of a column."""
    kinds: dict[str, Any] = {"without": None}
    for drafts in args.drafts:
        settings: dict[str, Any] = {"type": drafts, "num_drafts": args.num_drafts}
        if drafts == "model":
            settings["model"] = args.draft_model
        kinds |= {drafts: settings, f"{drafts} always": settings | {"always": True}}
    return kinds


def measured(
    model: Any, tokenizer: Any, texts: list[str], sampling: dict[str, Any], kinds: dict[str, Any], args: Any
) -> dict[str, float]:
    """Return the median speeds, and of each drafter what was kept, and how many steps had drafts."""
    prompts = [Prompt(tuple(_ids(tokenizer, text)), text) for text in texts]
    engines = {
        kind: EmbeddedEngine(
            model, tokenizer, RolloutSettings.model_validate({"speculation": settings, "native": args.native})
        )
        for kind, settings in kinds.items()
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    completions = set()
    params = SamplingParams(max_new_tokens=args.new_tokens, ignore_eos=True, seed=0, **sampling)
    for number in range(args.rounds + 1):
        for kind, engine in engines.items():
            start = time.process_time()
            rollouts = engine.generate(prompts, params)
            completions.add(tuple(c.token_ids for rollout in rollouts for c in rollout.completions))
            if number:
                times[kind].append(time.process_time() - start)
    num_tokens = len(texts) * args.new_tokens
    figures = {kind: num_tokens / statistics.median(seconds) for kind, seconds in times.items()}
    figures["different"] = len(completions)  # in 16 bits the Python step rounds by the number of rows
    for drafts in args.drafts:
        figures[f"{drafts} kept"] = engines[f"{drafts} always"].metrics()["engine/draft_acceptance"]
        figures[f"{drafts} steps"] = engines[drafts].metrics()["engine/draft_steps_frac"]
    return figures


def _ids(tokenizer: Any, text: str) -> list[int]:
    if tokenizer.chat_template is None:
        return list(tokenizer.encode(text, add_special_tokens=False))
    messages = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


if __name__ == "__main__":
    main()

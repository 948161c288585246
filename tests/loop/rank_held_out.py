"""Run by torchrun: held-out data measured by as many ranks as there are. Usage: rank_held_out.py FOLDER"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from alignlab import EvaluationSettings, GRPOTrainer, LoraSettings
from alignlab.config.trainers import GRPOConfig
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.evaluation.results import Evaluation
from alignlab.models.hub.checkpoints import new_model
from tests.trainers.conftest import DENSE
from tests.trainers.tiny import CASES, examples, labelled, make_case, pairs

HELD_OUT = {"sft": examples, "dpo": pairs, "kto": labelled, "reward": pairs}
KINDS = [*HELD_OUT, "dpo_precomputed", "dpo_all_weights", "grpo"]
REPEATED = ["ab", "abc", "abd", "ab", "123", "ab1", "abc"]


def first_letter(completions: list[str], **columns: Any) -> list[float | None]:
    """1 for some texts, None for the problems of one prompt."""
    texts = zip(columns["prompts"], completions, strict=True)
    return [None if prompt == "123" else float(len(text) % 2) for prompt, text in texts]


def measured(kind: str, folder: Path) -> Evaluation | None:
    """Measure held-out data with a model whose weights are random, moved by a step of training."""
    tokenizer = train_tokenizer(["abc abd ab ba 123"], vocab_size=262)
    torch.manual_seed(0)
    model = new_model(DENSE, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1)
    if kind == "grpo":
        rows = [{"prompt": text, "answer": "a"} for text in REPEATED]
        trainer: Any = GRPOTrainer(
            model, [first_letter], GRPOConfig(output_dir=folder / kind, num_prompts=2, trackers=()), rows,
            eval_dataset=rows, tokenizer=tokenizer, peft_config=LoraSettings(rank=2),
            evaluation=EvaluationSettings(num_samples=3, pass_at=(1, 2)),
        )
        return trainer.evaluate()
    name = kind.split("_")[0]
    options = {"precompute_reference": "precomputed" in kind} if name in ("dpo", "kto") else {}
    case = CASES[name]
    adapted = case.lora and "all_weights" not in kind
    CASES[name] = type(case)(**vars(case) | {"held_out": lambda: HELD_OUT[name](11, seed=1), "lora": adapted})
    trainer = make_case(name, folder / kind, model, tokenizer, memory={"tokens_per_microbatch": 24}, **options)
    CASES[name] = case
    generator = torch.Generator().manual_seed(1)  # a policy that is not its reference
    with torch.no_grad():
        for weight in trainer.learner.trained.values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    if "precomputed" in kind:
        trainer.algorithm.prepare(trainer.train_examples, trainer.eval_examples)
    return trainer.evaluate()


def main() -> None:
    folder = Path(sys.argv[1])
    os.environ["ALIGNLAB_CACHE"] = str(folder / "cache")
    results = {kind: measured(kind, folder) for kind in KINDS}
    values = {kind: None if result is None else result.to_json() for kind, result in results.items()}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(values))


if __name__ == "__main__":
    main()

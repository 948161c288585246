"""Run by a launcher: cases of `tests.trainers.tiny` on as many ranks as there are, with their weights in some places.

Usage: rank_cases.py FOLDER PLACE [CASE ...]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.models.hub.checkpoints import new_model
from tests.models.attention_kinds import KIMI
from tests.quick import be_quick
from tests.trainers.conftest import DENSE
from tests.trainers.steps import weights_of
from tests.trainers.tiny import CASES, make_case, prompts

_SHARED = ("sft", "dpo", "grpo", "ppo", "ppo_critic_head")
"""Cases that the stages of ZeRO beside the third, which spreads most, are tried with."""
_IN_OTHERS = {"sft": "sft_options", "dpo": "dpo_early_stopping", "reward": "reward_ema"}
"""Cases of which another one has every part, and that one; DDP trains them too."""


def _largest(names: Collection[str]) -> tuple[str, ...]:
    """Return the cases of which none of the others has every part."""
    return tuple(name for name in names if _IN_OTHERS.get(name) not in names)


_SPREAD = _largest([name for name, case in CASES.items() if "ema" not in case.settings])
"""Cases that DeepSpeed trains, which has no average of the weights."""
_HYBRID = ("sft_hybrid", "grpo_hybrid")
"""Cases whose model has a recurrent layer, gated attention, a mixture of heads, and multi-token prediction."""
_EVALUATED = ("grpo_ema",)
"""Cases of trainers with rollouts whose held-out accuracy is measured, by an engine that samples from the average."""
HYBRID: dict[str, Any] = {
    **DENSE, **KIMI, "num_hidden_layers": 3, "num_key_value_heads": 1, "num_attention_experts": 6, "num_mtp_layers": 1,
    "layer_types": ["kimi_delta_attention", "mixture_of_heads", "gated_attention"],
}  # fmt: skip
PLACES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "ddp": ({"strategy": "ddp"}, (*CASES, *_HYBRID)),
    "fsdp2": ({"strategy": "fsdp2"}, (*_largest(CASES), *_HYBRID)),
    "zero1": ({"strategy": "zero1"}, _SHARED),
    "zero2": ({"strategy": "zero2"}, _SHARED),
    "zero3": ({"strategy": "zero3"}, (*_SPREAD, *_HYBRID)),
    "zero2, states on the host": ({"strategy": "zero2", "offload": "optimizer"}, ("sft", "ppo")),
    "zero3, all on the host": ({"strategy": "zero3", "offload": "all"}, ("sft", "ppo", "grpo")),
}
"""Where the weights in training live: settings of `trainer.sharding`, and the cases that are trained so."""
SEED = 7
EPSILON = 1e-3


def train(name: str, folder: Path, place: str = "ddp") -> dict[str, torch.Tensor]:
    """Train a case, and return all that was trained."""
    tokenizer = train_tokenizer(["abc abd ab ba 123"], vocab_size=262)
    torch.manual_seed(0)
    architecture = HYBRID if name in _HYBRID else DENSE
    model = new_model(architecture, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1)
    held_out = prompts(3) if name in _EVALUATED else None
    case = name.removesuffix("_hybrid")
    # A few packs a step: each gathers all weights, by hundreds of exchanges.
    num_tokens = 32 if CASES[case].settings.get("group_size", 1) > 1 else 16
    settings = {"memory": {"tokens_per_microbatch": num_tokens}, "sharding": PLACES[place][0]}
    trainer = make_case(case, folder / name, model, tokenizer, held_out=held_out, **settings)
    if hasattr(trainer, "source"):
        sample_without_rank(trainer.source)
    for learner in trainer.learners.values():
        for group in learner.optimizer.param_groups:
            # Adam divides a gradient that is nothing but rounding by itself; with this epsilon it stays near 0.
            group["eps"] = EPSILON
    trainer.train()
    return weights_of(trainer)


def sample_without_rank(source: Any) -> None:
    """Sample every prompt with one seed. A rank's own seeds are by design others than those of a run on one rank."""
    sample = source._sample
    source._sample = lambda prompts, seed: sample(prompts, SEED)


def main() -> None:
    place, names = sys.argv[2], sys.argv[3:]
    folder = Path(sys.argv[1]) / place
    be_quick()
    os.environ["ALIGNLAB_CACHE"] = str(folder / "cache")
    for name in names or PLACES[place][1]:
        save_file(
            {key: weight.clone() for key, weight in train(name, folder, place).items()},
            folder / f"{name}.rank{os.environ['RANK']}.safetensors",
        )


if __name__ == "__main__":
    main()

"""How often routers disagree between the engine that sampled and the trainer, and what replaying its choices mends.

    python -m tests.bench.bench_routing [--engines embedded vllm]

A mixture of 16 experts, 2 a token, in 4 layers, random weights; 32 prompts of 24 tokens x 4 completions of 32.
For each engine: the fraction of token-layers whose experts differ, and the gap of the log-probs, nats, without and with
replay (R3), in float32 and bfloat16. Then, after an update of the policy, the gap to its log-probs of before, whose
routers moved, without and with replay of the trainer's own choices (R2). Prints a table, and JSON last.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from alignlab.config.rollout import RolloutSettings, VLLMSettings
from alignlab.data.packing import pack_rollouts
from alignlab.models.policy import Policy
from alignlab.rollout.engine import make_engine
from alignlab.types import Experience, SamplingParams
from tests.rollout.conftest import make_prompts
from tests.rollout.conftest import tokenizer as make_tokenizer
from tests.rollout.vllm.conftest import QWEN3_MOE, make_model

SHAPE = QWEN3_MOE | {"num_experts": 16, "num_hidden_layers": 4}
SAMPLING = SamplingParams(n=4, max_new_tokens=32, ignore_eos=True, seed=0)
SETTINGS = {"embedded": RolloutSettings(), "vllm": VLLMSettings(cache_gib=0.2, block_size=32, canary_gate=20.0)}


@torch.no_grad()
def gaps(policy: Policy, packs: Sequence[Experience]) -> dict[str, float]:
    """Disagreement of routers with the packs' records, and the gap to the packs' log-probs, free and replayed."""
    found: dict[str, list[torch.Tensor]] = {"differs": [], "free": [], "replayed": []}
    for pack in packs:
        for name, routing in (("free", None), ("replayed", pack.routing)):
            output = policy(pack.tokens, pack.segments, pack.completion_mask, routing=routing)
            found[name].append((output.logprobs - pack.rollout_logprobs)[pack.completion_mask].abs())
        found["differs"].append(output.routing_disagreement[pack.completion_mask])
    differs, free, replayed = (torch.cat(values) for values in found.values())
    return {
        "disagreement": float(differs.mean()), "mean_gap": float(free.mean()), "max_gap": float(free.max()),
        "replayed_mean_gap": float(replayed.mean()), "replayed_max_gap": float(replayed.max()),
    }  # fmt: skip


def of_engine(name: str, dtype: torch.dtype) -> dict[str, float]:
    """Between an engine and the trainer, at the same weights."""
    model = make_model(SHAPE, seed=3, dtype=dtype)
    engine: Any = make_engine(model, make_tokenizer.__wrapped__(), SETTINGS[name])
    rollouts = engine.generate(make_prompts(*[24] * 32), SAMPLING)
    found = gaps(Policy(model), pack_rollouts(rollouts, budget=4096))
    if name == "vllm":
        engine.close()
    return found


def after_update(dtype: torch.dtype) -> dict[str, float]:
    """Between the policy before and after a move of every weight by 1 % of its size."""
    model = make_model(SHAPE, seed=3, dtype=dtype)
    engine = make_engine(model, make_tokenizer.__wrapped__(), SETTINGS["embedded"])
    packs, policy = [], Policy(model)
    for pack in pack_rollouts(engine.generate(make_prompts(*[24] * 32), SAMPLING), budget=4096):
        with torch.no_grad():
            output = policy(pack.tokens, pack.segments, pack.completion_mask)
        packs.append(replace(pack, routing=output.routing, rollout_logprobs=output.logprobs))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * weight.std() * 0.01)
    return gaps(policy, packs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    options = parser.parse_args()
    results = {}
    # vLLM's groups of ranks are the process's: its engines come one after the other, each closed.
    for name in options.engines:
        for dtype in (torch.float32, torch.bfloat16):
            results[f"{name} {str(dtype)[6:]}"] = of_engine(name, dtype)
    results["after an update, float32"] = after_update(torch.float32)
    columns = ("disagreement", "mean_gap", "max_gap", "replayed_mean_gap", "replayed_max_gap")
    print(f"{'':26}" + "".join(f"{column:>19}" for column in columns))
    for name, found in results.items():
        print(f"{name:26}" + "".join(f"{found[column]:19.2e}" for column in columns), flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()

"""Run by a launcher: two ranks that each have a vLLM, and then share one, are given the same work.

Usage: rank_shared_vllm.py FOLDER MODEL
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from alignlab.config.rollout import VLLMSettings
from alignlab.errors import RolloutError
from alignlab.rollout.engine import make_engine
from alignlab.types import SamplingParams
from tests.rollout.conftest import flat, make_prompts
from tests.rollout.vllm.conftest import SMALL
from tests.trainers.rank_engines import make_model, make_tokenizer

SAMPLED = SamplingParams(n=3, max_new_tokens=12, ignore_eos=True, seed=5)
GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True)


def change(model: Any, seed: int) -> None:
    """Change the weights in the same way on every rank."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)


def completions(engine: Any, *lengths: int) -> list[Any]:
    """Return tokens, log-probs and experts of completions, sampled and greedy, as JSON."""
    found = [c for sampling in (SAMPLED, GREEDY) for c in flat(engine.generate(make_prompts(*lengths), sampling))]
    return [[c.token_ids, c.logprobs, None if c.routing is None else c.routing.tolist()] for c in found]


def faults(engine: Any, rank: int) -> list[Any]:
    """Return what a rank sees of another one's request that is refused, and of a call that it alone abandons."""
    events: list[Any] = []
    try:
        engine.generate(make_prompts(*([128] if rank == 1 else [5])), SAMPLED)
    except RolloutError as error:
        events.append(str(error))
    step, calls = engine._backend._llm.llm_engine.step, [engine.abandon] if rank == 0 else []

    def step_and_abandon() -> Any:
        if calls:
            calls.pop()()
        return step()

    engine._backend._llm.llm_engine.step = step_and_abandon
    try:
        events.append(len(completions(engine, 5)))
    except RolloutError as error:
        events.append(str(error))
        engine.generate(make_prompts(5), GREEDY)  # the second call of `completions`, which the other rank makes
    engine._backend._llm.llm_engine.step = step
    return events


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    results: dict[str, Any] = {}
    for size in (1, 2):
        model = make_model(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vLLM's own, when it is imported and started
            settings = VLLMSettings(tensor_parallel=size, **SMALL)
            engine = make_engine(model, make_tokenizer(), settings)
        results[f"{size} first"] = completions(engine, *((5, 9), (30,))[rank])
        for version in (1, 2):
            change(model, version)
            engine.update_weights(version)
        results[f"{size} later"] = completions(engine, *((5, 9), ())[rank])
        results[f"{size} gap"] = engine.last_sync.gap.largest  # type: ignore[attr-defined]
        if size == 2:
            results["faults"] = faults(engine, rank)
            results["after the faults"] = completions(engine, *((5, 9), ())[rank])
        engine.close()
    (folder / f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ["ALIGNLAB_CACHE"] = str(Path(sys.argv[1]) / "cache")
    main()

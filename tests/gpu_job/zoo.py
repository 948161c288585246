"""Layers and caches that the other parts do not have: the embedded engine's log-probs against the trainer's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from alignlab.config.rollout import RolloutSettings
from alignlab.data.packing import pack_rollouts
from alignlab.loop.forward import PolicyForward
from alignlab.models.hub.checkpoints import new_model
from alignlab.models.kv_approximation.choice import replayed_approximation
from alignlab.models.policy import Policy
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.types import Prompt, Rollout, SamplingParams
from tests.gpu_job.decoding import make_tokenizer
from tests.gpu_job.kernels import DENSE
from tests.gpu_job.lines import Line, checked
from tests.rollout.conftest import VOCAB

PRESETS = ("mla", "gated_deltanet", "qwen3_next", "gpt_oss")
CACHES: tuple[dict[str, Any], ...] = ({"type": "int8"}, {"type": "int4"}, {"type": "window", "tokens": 24})
GAPS = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Largest difference of a token's log-prob between engine and trainer, nats."""
NUM_TOKENS = {"cuda": 200, "cpu": 40}
"""Tokens of a completion: more than a chunk of a recurrent layer, and than a group of the cache."""


def layers(device: torch.device) -> Iterator[Line]:
    """Yield the gap between engine and trainer of latent and recurrent layers, gates, sinks and experts with biases."""
    for preset in PRESETS:
        for dtype, limit in GAPS.items():
            torch.manual_seed(0)
            model = new_model({"preset": preset, "sliding_window": 32} if preset == "gpt_oss" else {"preset": preset},
                              vocab_size=VOCAB).to(device, dtype)  # fmt: skip
            gap = largest_gap(Policy(model), generated(model, RolloutSettings()), device)
            yield checked(f"{preset}: engine against trainer, {str(dtype)[6:]}", gap, limit)


def caches(device: torch.device) -> Iterator[Line]:
    """Yield the gap between an engine whose cache approximates and the trainer that replays it."""
    for cache in CACHES:
        settings = RolloutSettings.model_validate({"kv_cache": cache})
        torch.manual_seed(0)
        model = new_model(DENSE, vocab_size=VOCAB).to(device)
        policy = Policy(model, kv_approximation=replayed_approximation(settings, model))
        gap = largest_gap(policy, generated(model, settings), device)
        yield checked(f"a cache of type {cache['type']}, replayed: engine against trainer", gap, 1e-3)


def generated(model: Any, settings: RolloutSettings) -> list[Rollout]:
    """Return completions of prompts of several lengths."""
    prompts = [Prompt(tuple(range(1, 20 + 60 * n)), "") for n in range(3)]
    sampling = SamplingParams(n=3, max_new_tokens=NUM_TOKENS[model.device.type], seed=1, ignore_eos=True)
    return EmbeddedEngine(model, make_tokenizer(), settings).generate(prompts, sampling)


def largest_gap(policy: Policy, rollouts: Sequence[Rollout], device: torch.device) -> float:
    """Return the largest difference of a token's log-prob between engine and trainer, nats."""
    gap = 0.0
    with torch.no_grad():
        for pack in pack_rollouts(rollouts, budget=4096):
            moved = pack.to(device)
            assert moved.rollout_logprobs is not None
            gap = max(gap, float((PolicyForward()(policy, moved).logprobs - moved.rollout_logprobs).abs().max()))
    return gap

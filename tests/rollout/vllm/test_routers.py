"""Routers of ours inside vLLM: the experts that the trainer chooses, or a refusal by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from alignlab.config.rollout import VLLMSettings
from alignlab.errors import ConfigError
from alignlab.rollout.vllm.options import engine_options
from alignlab.types import SamplingParams
from tests.models.routers_cases import ROUTERS
from tests.rollout.conftest import make_prompts
from tests.rollout.vllm.conftest import QWEN3_MOE, make_model
from tests.rollout.vllm.test_routing import trainers_choices

SHAPE = QWEN3_MOE | {"num_experts": 6}
SAMPLING = SamplingParams(n=2, max_new_tokens=8, ignore_eos=True, seed=0)


@pytest.mark.vllm
@pytest.mark.parametrize("name", ["groups_v3", "noisy", "base", "sinkhorn", "reinforce"])
def test_records_are_the_trainers_choices_before_and_after_an_update(
    name: str, make_vllm: Callable[..., Any]
) -> None:
    """The engine verifies its log-probs at the update by itself."""
    model = make_model(SHAPE | ROUTERS[name])
    engine = make_vllm(model, prefill_tokens=128)
    for version in (0, 1):
        if version:
            torch.manual_seed(version)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(0.3 * weight.abs().mean() * torch.randn_like(weight))
            engine.update_weights(version)
        for rollout in engine.generate(make_prompts(9, 20), SAMPLING):
            for completion in rollout.completions:
                routing, expected = completion.routing, trainers_choices(model, rollout, completion)
                assert routing is not None
                is_recorded = (routing >= 0).all(-1).all(-1)
                same = routing.sort(dim=-1).values == expected.sort(dim=-1).values
                assert is_recorded.sum() >= 7 and same[is_recorded].all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hash", "vLLM hands experts no ids"),
        ("by_order", "vLLM drops no choices"),
        ("expert_choice", "nothing can be generated"),
    ],
)
def test_vllm_refuses_routers_by_name(name: str, message: str) -> None:
    model = make_model(SHAPE | ROUTERS[name])
    with pytest.raises(ConfigError, match=message):
        engine_options(VLLMSettings(), model, adapter_rank=0, on_cpu=True)

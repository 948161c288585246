"""A vLLM spread over two worker processes takes every update whole, and its workers must agree on what they loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from alignlab.config.model import LoraSettings
from alignlab.errors import RolloutError
from alignlab.models.adapters import add_lora
from alignlab.rollout.vllm.protocol import digests_of_workers
from alignlab.types import SamplingParams
from tests.rollout.conftest import flat, make_prompts
from tests.rollout.vllm.conftest import DENSE, OWN_MOE, QWEN3_MOE, make_model

SHAPES = {"dense": DENSE, "own-moe": OWN_MOE}


def test_workers_that_loaded_the_same_have_one_answer() -> None:
    loaded = {"a": "1", "b": "2"}
    assert digests_of_workers([loaded]) == digests_of_workers([loaded, {"b": "2", "a": "1"}]) == loaded


@pytest.mark.parametrize("other", [{"a": "1", "b": "3"}, {"a": "1"}, {"a": "1", "b": "2", "b2": "4"}])
def test_a_worker_that_loaded_another_tensor_is_named(other: dict[str, str]) -> None:
    loaded = {"a": "1", "b": "2"}
    with pytest.raises(RolloutError, match=r"of vLLM's 3 workers, worker 2 loaded another tensor b2? than worker 0"):
        digests_of_workers([loaded, loaded, other])


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_updates_of_two_workers_are_exact(shape: str, make_vllm: Callable[..., Any]) -> None:
    """Also of a LoRA policy, whose adapter is merged; the experts that were chosen are those of one worker."""
    model = make_model(SHAPES[shape])
    policy = add_lora(model, LoraSettings(rank=4)) if shape == "dense" else model
    engine = make_vllm(policy, tensor_parallel=2)
    for _ in range(2):
        with torch.no_grad():
            for weight in policy.parameters():
                weight.add_(torch.randn_like(weight) * 0.1 * weight.requires_grad)
        engine.update_weights(engine.policy_version + 1)
        assert engine.last_sync.gap.largest < 5e-5
    completions = flat(engine.generate(make_prompts(5, 9), SamplingParams(n=2, max_new_tokens=4, seed=1)))
    for completion in completions:
        assert (completion.routing is not None) == ("moe" in shape)


@pytest.mark.vllm
@pytest.mark.slow
def test_updates_of_a_servers_two_workers_are_exact(serve: Callable[..., Any], make_client: Callable[..., Any]) -> None:
    model = make_model(QWEN3_MOE)
    settings, _ = serve(model, tensor_parallel=2)
    engine = make_client(model, settings)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    engine.update_weights(1)
    assert engine.last_sync.gap.largest < 5e-5
    [completion] = flat(engine.generate(make_prompts(5), SamplingParams(max_new_tokens=4, seed=1)))
    assert completion.routing is not None and completion.routing[:-1].min() >= 0

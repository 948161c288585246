"""The real vLLM with a cache in fp8: updates, the prefixes of older weights, and a canary that meets wrong scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from alignlab.errors import RolloutError
from alignlab.rollout.verification import canary_gap
from alignlab.types import SamplingParams
from tests.rollout.conftest import make_prompts
from tests.rollout.vllm.conftest import DENSE, make_model
from tests.rollout.vllm.test_sync import shake

pytestmark = pytest.mark.vllm


def test_a_cache_in_fp8_is_near_after_each_update_and_stale_scales_are_caught(
    make_vllm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(DENSE)
    engine = make_vllm(model, kv_cache="fp8")
    prompts = make_prompts(40, 70)  # whole blocks of 32 tokens, which a later call finds
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True, seed=1)
    for _ in range(2):
        gap = canary_gap(model, engine.generate(prompts, sampling))
        assert 1e-3 < gap.mean < 0.4 and gap.largest < 1.2
        shake(model, 0.02)
        engine.update_weights(engine.policy_version + 1)
        assert 1e-3 < engine.last_sync.gap.largest < 1.2

    def with_stale_scales(served: torch.nn.Module) -> None:
        for module in served.modules():
            if hasattr(module, "_k_scale_float"):  # under such a scale codes end at 448 x 1e-4
                module._k_scale_float = module._v_scale_float = 1e-4

    with monkeypatch.context() as patch:
        patch.setattr("alignlab.rollout.vllm.inside.patches.after_update", with_stale_scales)
        with pytest.raises(RolloutError, match="does not compute what the policy computes"):
            engine.update_weights(engine.policy_version + 1)


def test_a_server_with_a_cache_in_fp8_samples_from_each_update(
    serve: Callable[..., Any], make_client: Callable[..., Any]
) -> None:
    """Near the policy, not equal, and by no prefix of older weights; the update after a large change is near too."""
    model = make_model(DENSE)
    settings, _ = serve(model, kv_cache="fp8")
    engine, prompts = make_client(model, settings), make_prompts(40, 70)
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True, seed=1)
    for strength in (0.02, 0.2):
        rollouts = engine.generate(prompts, sampling)
        gap = canary_gap(model, rollouts)
        assert 1e-3 < gap.mean < 0.4 and gap.largest < 1.2
        shake(model, strength)
        engine.update_weights(engine.policy_version + 1)
        assert 1e-3 < engine.last_sync.gap.largest < 1.2
    fresh = canary_gap(model, engine.generate(prompts, sampling)).mean
    assert fresh < 0.7 and canary_gap(model, rollouts).mean > 2 * fresh, "those are of the weights before"
    completions = [c for rollout in engine.generate(prompts, sampling) for c in rollout.completions]
    assert {version for c in completions for version in c.policy_versions} == {engine.policy_version}

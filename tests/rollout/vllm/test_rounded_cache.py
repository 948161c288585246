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

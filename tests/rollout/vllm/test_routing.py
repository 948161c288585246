"""Experts that vLLM chooses are recorded for each token, and replayed by the trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.data.packing import pack_rollouts
from alignlab.models.decoder import hidden_states
from alignlab.models.policy import Policy
from alignlab.models.routing import RoutingRecord
from alignlab.types import Completion, Rollout, SamplingParams, Segments
from tests.rollout.conftest import make_prompts
from tests.rollout.vllm.conftest import OWN_MOE, QWEN3_MOE, make_model

pytestmark = pytest.mark.vllm
Make = Callable[..., Any]
SAMPLING = SamplingParams(n=3, max_new_tokens=12, ignore_eos=True, seed=0)


def trainers_choices(model: torch.nn.Module, rollout: Rollout, completion: Completion) -> Tensor:
    """Return the experts that the trainer's routers choose for the same tokens."""
    tokens = torch.tensor(rollout.prompt.token_ids + completion.token_ids)
    segments, record = Segments.single(len(tokens)), RoutingRecord()
    with torch.no_grad():
        hidden_states(model, tokens, segments.position_ids, segments, routing=record)
    return record.stacked_choices()


@pytest.mark.parametrize("shape", [QWEN3_MOE, OWN_MOE], ids=["qwen3-moe", "own"])
def test_records_are_the_trainers_choices_in_float32(shape: dict[str, Any], make_vllm: Make) -> None:
    model = make_model(shape)
    engine = make_vllm(model, prefill_tokens=128)
    recorded = missing = 0
    for rollout in engine.generate(make_prompts(9, 70, 33), SAMPLING):
        for number, completion in enumerate(rollout.completions):
            routing, expected = completion.routing, trainers_choices(model, rollout, completion)
            assert routing is not None and routing.shape == expected.shape and routing.dtype == torch.int16
            is_recorded = (routing >= 0).all(dim=-1)
            in_all_layers = is_recorded.all(dim=-1)
            assert torch.equal(is_recorded.any(dim=-1), in_all_layers), "a token is recorded in some layers only"
            same = routing.sort(dim=-1).values == expected.sort(dim=-1).values
            assert same[is_recorded].all()
            prompt = len(rollout.prompt.token_ids)
            assert is_recorded[prompt:-1].all() and not is_recorded[-1].any()
            assert is_recorded[:prompt].all() or number > 0  # later completions of a group find the prompt in the cache
            recorded, missing = recorded + int(is_recorded.sum()), missing + int((~is_recorded[:prompt]).sum())
    assert recorded > 0 and missing > 0


def test_replay_closes_the_gap_of_bfloat16(make_vllm: Make) -> None:
    """Rounding changes the choice of routers near a tie; with replay, only the rounding itself remains."""
    model = make_model(QWEN3_MOE | {"num_experts": 16, "num_hidden_layers": 4}, seed=3, dtype=torch.bfloat16)
    rollouts = make_vllm(model, canary_gate=20.0).generate(make_prompts(20, 31, 12), SAMPLING)
    policy, gaps = Policy(model), {}
    for pack in pack_rollouts(rollouts, budget=4096):
        assert pack.routing is not None and pack.rollout_logprobs is not None
        for name, routing in (("chosen", None), ("replayed", pack.routing)):
            with torch.no_grad():
                logprobs = policy(pack.tokens, pack.segments, pack.completion_mask, routing=routing).logprobs
            gaps[name] = (logprobs - pack.rollout_logprobs)[pack.completion_mask].abs()
    assert gaps["replayed"].mean() < 0.5 * gaps["chosen"].mean()
    assert gaps["replayed"].mean() < 0.05

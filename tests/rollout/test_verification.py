"""Digests and canaries show weights that are not the policy's."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from alignlab.config.model import LoraSettings
from alignlab.errors import RolloutError
from alignlab.models.adapters import add_lora
from alignlab.models.hub.export import adapter_tensors
from alignlab.models.sync_digests import WORD_SUMS, sync_digests
from alignlab.rollout.verification import (
    GATES,
    CanaryGap,
    adapter_digests,
    canary_gap,
    check_arrived,
    check_canary,
    trainer_logprobs,
)
from alignlab.types import Rollout, SamplingParams
from tests.rollout.conftest import MakeEngine, flat, full_logprobs, make_prompts

SENT = {"a": "1", "b": "2", "c": "3"}


@pytest.fixture
def rollouts(make_engine: MakeEngine) -> list[Rollout]:
    return make_engine().generate(make_prompts(4, 9), SamplingParams(n=2, max_new_tokens=5, ignore_eos=True, seed=1))


def test_the_trainers_logprobs_are_those_of_the_full_forward(llama: PreTrainedModel, rollouts: list[Rollout]) -> None:
    logprobs = iter(trainer_logprobs(llama, rollouts))
    for rollout in rollouts:
        start = len(rollout.prompt.token_ids)
        for completion in rollout.completions:
            rows = full_logprobs(llama, rollout.prompt.token_ids + completion.token_ids)[start - 1 : -1]
            expected = rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(next(logprobs), expected, atol=1e-5, rtol=0)


def test_a_canary_of_the_same_weights_passes(llama: PreTrainedModel, rollouts: list[Rollout]) -> None:
    gap = canary_gap(llama, rollouts)
    assert gap.num_tokens == sum(len(c.token_ids) for c in flat(rollouts)) and gap.mean <= gap.largest < 5e-5
    check_canary(gap, GATES[torch.float32])


def test_a_canary_of_a_mixture_takes_the_experts_that_the_engine_recorded(
    sparse: PreTrainedModel, make_engine: MakeEngine
) -> None:
    sampling = SamplingParams(n=2, max_new_tokens=5, ignore_eos=True, seed=1)
    [rollout] = make_engine(sparse).generate(make_prompts(6), sampling)
    assert canary_gap(sparse, [rollout]).largest < 5e-5
    others = [replace(c, routing=torch.where(c.routing >= 0, (c.routing + 1) % 4, -1)) for c in rollout.completions]
    assert canary_gap(sparse, [replace(rollout, completions=tuple(others))]).largest > 1e-3


def test_a_canary_shows_one_wrong_layer(llama: PreTrainedModel, rollouts: list[Rollout]) -> None:
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight.zero_()
    with pytest.raises(RolloutError, match=r"over 20 canary tokens its log-probs differ .* must by at most 0\.001"):
        check_canary(canary_gap(llama, rollouts), GATES[torch.float32])


def test_a_canary_that_is_not_a_number_fails() -> None:
    with pytest.raises(RolloutError, match="by up to nan nats"):
        check_canary(CanaryGap(math.nan, math.nan, 4), 0.5)


def test_the_canary_leaves_training_modes_alone(llama: PreTrainedModel, rollouts: list[Rollout]) -> None:
    llama.train()
    llama.model.layers[0].eval()  # frozen, for instance
    modes = [module.training for module in llama.modules()]
    canary_gap(llama, rollouts)
    assert [module.training for module in llama.modules()] == modes


@pytest.mark.parametrize(
    ("arrived", "message"),
    [
        ({"a": "1", "c": "3"}, r"tensor b did not arrive \(1 of 3 tensors are wrong\)"),
        ({"a": "2", "b": "1", "c": "3"}, r"tensor a arrived with another content \(2 of 3 tensors are wrong\)"),
        (SENT | {"d": "4"}, "tensor d arrived and was never sent"),
    ],
)
def test_digests_name_the_tensor_that_is_wrong(arrived: dict[str, str], message: str) -> None:
    check_arrived(SENT, dict(reversed(SENT.items())))
    with pytest.raises(RolloutError, match=message):
        check_arrived(SENT, arrived)


def test_digests_of_an_adapter_are_of_rounded_and_scaled_matrices(llama: PreTrainedModel) -> None:
    policy = add_lora(llama, LoraSettings(rank=2, alpha=6))
    sent = adapter_tensors(policy)
    digests = adapter_digests(policy, sent, torch.bfloat16)
    assert len(digests) == len(sent) == 2 * 7 * 2
    layer = policy.base_model.model.model.layers[1].mlp.up_proj
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    name = "model.layers.1.mlp.up_proj"
    expected = {f"{name}.lora_A": down.bfloat16(), f"{name}.lora_B": up.bfloat16() * 3}
    assert expected.keys() <= digests.keys()
    assert {key: digests[key] for key in expected} == sync_digests(expected)
    by_word_sums = adapter_digests(policy, sent, torch.bfloat16, algorithm=WORD_SUMS)
    assert {key: by_word_sums[key] for key in expected} == sync_digests(expected, algorithm=WORD_SUMS)

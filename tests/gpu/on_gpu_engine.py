"""The embedded engine on a pretended GPU: completions, log-probs and expert choices equal to the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from alignlab.config.model import LoraSettings
from alignlab.config.rollout import RolloutSettings
from alignlab.models.adapters import add_lora
from alignlab.models.hub.checkpoints import new_model
from alignlab.rollout.embedded import sampling as sampling_module
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.types import Prompt, Rollout, SamplingParams
from tests.gpu.graph_stand_in import Rerun
from tests.models.attention_kinds import KINDS as ATTENTION_KINDS
from tests.trainers.conftest import DENSE, SPARSE

MIXTURE = SPARSE | {"mlp_layer_types": None, "n_shared_experts": 1}
SLIDING = DENSE | {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
KINDS: dict[str, tuple[dict[str, Any], torch.dtype, dict[str, Any]]] = {
    "dense": (DENSE, torch.float32, {"top_k": 20, "top_p": 0.9}),
    "a nucleus wider than the tokens looked at first": (DENSE, torch.float32, {"top_p": 0.95}),
    "dense in bfloat16": (DENSE, torch.bfloat16, {"repetition_penalty": 1.2, "min_new_tokens": 4}),
    "a sliding window and a soft-cap": (
        SLIDING | {"attn_logit_softcapping": 20.0}, torch.float32, {"temperature": 0.0},
    ),
    "every kind of attention": (DENSE | ATTENTION_KINDS["all"], torch.float32, {"top_k": 20}),
    "mixture": (MIXTURE, torch.bfloat16, {"min_p": 0.01, "temperature": 0.8}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_completions_of_a_cpu(
    kind: str, gpu: Callable[..., Any], cpu: Callable[..., Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling_module, "_NUCLEUS", 2)
    architecture, dtype, sampling = KINDS[kind]
    params = SamplingParams(**{"n": 3, "max_new_tokens": 8, "seed": 5} | sampling)
    prompts = [Prompt(tuple(range(1, 7 + 9 * i)), "") for i in range(3)]

    def results(device: str) -> tuple[list[Rollout], list[torch.Tensor], int]:
        torch.manual_seed(0)
        model = new_model(
            architecture, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ).to(dtype)
        engine = EmbeddedEngine(
            add_lora(model, LoraSettings(rank=2)).to(device), tokenizer,
            RolloutSettings(block_size=16, cache_tokens=160, prefill_tokens=16),
        )
        rollouts = engine.generate(prompts, params)
        return rollouts, engine.logprobs(rollouts), engine.num_preempted

    with cpu():
        expected, expected_logprobs, num_preempted = results("cpu")
    with gpu():
        rollouts, logprobs, num_preempted_on_gpu = results("cuda:0")
    assert Rerun.made, "steps were replayed"
    assert num_preempted == num_preempted_on_gpu > 0, "a small cache, so that sequences are computed again"
    for rollout, expected_rollout in zip(rollouts, expected, strict=True):
        for completion, other in zip(rollout.completions, expected_rollout.completions, strict=True):
            assert (completion.token_ids, completion.logprobs) == (other.token_ids, other.logprobs)
            if other.routing is not None:
                assert completion.routing is not None and torch.equal(completion.routing, other.routing)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(logprobs, expected_logprobs, strict=True))

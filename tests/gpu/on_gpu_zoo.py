"""Every preset trains and decodes on a pretended GPU with the results of a CPU; its layers never make the host wait.

What a preset holds that the GPU cannot do by itself is in `ON_THE_HOST`, with how often it waits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.config.rollout import RolloutSettings
from alignlab.models.hub.checkpoints import new_model
from alignlab.models.policy import Policy
from alignlab.models.presets import preset_fields, preset_names
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.types import Prompt, Rollout, SamplingParams
from tests.gpu.graph_stand_in import Rerun
from tests.gpu.on_gpu_trainers import MAX_UPDATE_WAITS, train_on_both
from tests.gpu.on_gpu_waits import make_pack
from tests.gpu.steps import Steps, assert_same
from tests.trainers.tiny import make_case

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
NOT_CAUSAL = {"expert_choice"}
"""Presets that no engine samples from; SFT trains them."""
ON_THE_HOST = {"base_assignment": 4}
"""Waits of a training pass of presets whose routers assign tokens on the host: two for each layer of `SIZES`. What
compares log-probs, as GRPO does, has them choose without."""
DECODED = (
    "gemma2", "gated_attention", "gpt_oss", "hash", "kda", "kimi_linear", "deepseek_v3", "moa", "qwen3_next", "capacity"
)
"""Presets that decode in bfloat16 too, one of each kind of cache, of attention and of choice of experts."""


def make_preset(name: str, tokenizer: Any, **changes: Any) -> Any:
    """A small model of a preset; layers with a window see 6 tokens."""
    fields = SIZES | ({"sliding_window": 6} if "sliding_window" in preset_fields(name) else {}) | changes
    torch.manual_seed(0)
    return new_model(
        {"preset": name} | fields, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_trains_on_a_gpu_as_on_a_cpu(
    name: str, gpu: Callable[..., Any], cpu: Callable[..., Any], tokenizer: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind, sizes = ("sft", {}) if name in NOT_CAUSAL else ("grpo", {"num_prompts": 2, "group_size": 2})

    def make(folder: str) -> Any:
        model = make_preset(name, tokenizer)
        return make_case(kind, tmp_path / folder / "run", model, tokenizer, num_steps=1, **sizes)

    waits = train_on_both(make, gpu, cpu, monkeypatch)
    assert max(waits)[0] <= MAX_UPDATE_WAITS, max(waits)[1]


@pytest.mark.parametrize("name", preset_names())
def test_a_forward_and_backward_pass_of_a_preset_never_waits(
    name: str, gpu: Callable[..., Any], tokenizer: Any
) -> None:
    with gpu() as mode:
        policy = Policy(make_preset(name, tokenizer)).to("cuda:0").train()
        pack = make_pack().to("cuda:0")
        mode.reset()
        output = policy(pack.tokens, pack.segments, pack.completion_mask)
        loss = output.logprobs.sum() + output.entropy.sum()
        for more in (output.router_loss, output.mtp_loss):
            loss = loss if more is None else loss + more.sum()
        loss.backward()
        assert mode.num_waits == ON_THE_HOST.get(name, 0), mode.report()


@pytest.mark.parametrize("name", DECODED)
def test_a_preset_decodes_on_a_gpu_as_on_a_cpu_and_waits_once_a_step(
    name: str, gpu: Callable[..., Any], cpu: Callable[..., Any], tokenizer: Any
) -> None:
    """In bfloat16, in which steps of mixtures are replayed too; in a small cache, so that some are computed again."""
    prompts = [Prompt(tuple(range(1, 7 + 17 * i)), "") for i in range(2)]
    params = SamplingParams(n=3, max_new_tokens=8, seed=5)

    def results(device: str, **options: Any) -> tuple[list[Rollout], int]:
        model = make_preset(name, tokenizer).bfloat16().to(device)
        engine = EmbeddedEngine(model, tokenizer, RolloutSettings(block_size=16, cache_tokens=144, prefill_tokens=16))
        return engine.generate(prompts, params, **options), engine.num_preempted

    with cpu():
        expected, num_preempted = results("cpu")
    with gpu() as mode:
        steps = Steps(mode)
        rollouts, num_preempted_on_gpu = results("cuda:0", on_step=steps)
    assert Rerun.made, "steps were replayed"
    assert num_preempted == num_preempted_on_gpu
    assert_same(rollouts, expected)
    steps.check()

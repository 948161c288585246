from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from alignlab.config.model import LoraSettings
from alignlab.config.rollout import RolloutSettings
from alignlab.models.adapters import add_lora
from alignlab.models.decoder import hidden_states, output_head
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.rollout.embedded.weights import EngineWeights, PackedLinear
from alignlab.rollout.memory import engine_bytes, merges_adapters
from alignlab.types import SamplingParams, Segments
from tests.rollout.conftest import MakeEngine, flat, make_prompts

TOKENS = torch.arange(9)


def adapted(model: PreTrainedModel, scale: float = 0.3) -> nn.Module:
    """`model` with a LoRA adapter that is not zero."""
    policy = add_lora(model, LoraSettings(rank=4, alpha=8, dropout=0.1))
    torch.manual_seed(9)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=scale)
    return policy


def logits_of(model: nn.Module) -> torch.Tensor:
    segments = Segments.single(len(TOKENS))
    with torch.no_grad():
        hidden = hidden_states(model, TOKENS, segments.position_ids, segments)
        return nn.functional.linear(hidden, output_head(model)[0])


@pytest.mark.parametrize("name", ["llama", "dense"])
def test_merged_weights_are_the_live_adapter(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    base = logits_of(model)
    policy = adapted(model).eval()
    live = logits_of(policy)
    assert (live - base).abs().max() > 0.01
    with EngineWeights(policy, merge=True, pack=True).in_use():
        assert not any("lora" in key for key, _ in policy.named_parameters())
        torch.testing.assert_close(logits_of(policy), live, atol=1e-4, rtol=1e-4)
    with EngineWeights(policy, merge=False, pack=True).in_use():
        assert torch.equal(logits_of(policy), live)
    assert torch.equal(logits_of(policy), live)


def test_refreshing_takes_the_adapters_present_weights(llama: PreTrainedModel) -> None:
    policy = adapted(llama).eval()
    weights = EngineWeights(policy, merge=True, pack=False)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.mul_(1.5)
    live = logits_of(policy)
    with weights.in_use():
        assert (logits_of(policy) - live).abs().max() > 0.01
    weights.refresh()
    with weights.in_use():
        torch.testing.assert_close(logits_of(policy), live, atol=1e-4, rtol=1e-4)


def test_everything_is_put_back_after_ctrl_c(llama: PreTrainedModel) -> None:
    policy = adapted(llama).train()
    names, modes = [n for n, _ in policy.named_parameters()], [m.training for m in policy.modules()]
    weights = EngineWeights(policy, merge=True, pack=False)
    with pytest.raises(KeyboardInterrupt), weights.in_use():
        assert not any(module.training for module in policy.modules())
        raise KeyboardInterrupt
    assert [n for n, _ in policy.named_parameters()] == names
    assert [m.training for m in policy.modules()] == modes


def test_without_adapters_nothing_is_copied(llama: PreTrainedModel) -> None:
    with EngineWeights(llama, merge=True, pack=True).in_use():
        linears = [module for module in llama.modules() if isinstance(module, nn.Linear)]
        assert len(linears) == 2 * 7 + 1
        assert {id(linear.weight) for linear in linears} <= {id(weight) for weight in llama.parameters()}


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_packed_weights_give_the_same_results(name: str, request: pytest.FixtureRequest) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor does not multiply bfloat16")
    model = request.getfixturevalue(name).to(torch.bfloat16)
    plain = EngineWeights(model, merge=True, pack=False)
    packed = EngineWeights(model, merge=True, pack=True)
    segments = Segments.single(len(TOKENS))
    logits = []
    for weights in (plain, packed):
        with weights.in_use(), torch.no_grad():
            hidden = hidden_states(model, TOKENS, segments.position_ids, segments)
            logits.append(weights.logits(hidden))
    assert torch.equal(*logits)
    with packed.in_use():
        assert any(isinstance(module, PackedLinear) for module in model.modules())
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.2)
    plain.refresh()
    packed.refresh()
    fresh = []
    for weights in (plain, packed):
        with weights.in_use(), torch.no_grad():
            hidden = hidden_states(model, TOKENS, segments.position_ids, segments)
            fresh.append(weights.logits(hidden))
    assert torch.equal(*fresh)
    assert (fresh[0] - logits[0]).abs().max() > 0.05


@pytest.mark.parametrize("merge", [True, False])
def test_the_engine_samples_from_the_adapted_policy(
    merge: bool, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, make_engine: MakeEngine
) -> None:
    sampling = SamplingParams(temperature=0.0, max_new_tokens=10, ignore_eos=True)
    base = flat(make_engine().generate(make_prompts(8), sampling))[0]
    policy = adapted(llama)
    engine = EmbeddedEngine(policy, tokenizer, RolloutSettings(merge_lora=merge))
    completion = flat(engine.generate(make_prompts(8), sampling))[0]
    expected = list(make_prompts(8)[0].token_ids)
    policy.eval()
    for _ in range(10):
        with torch.no_grad():
            expected.append(int(policy(torch.tensor([expected])).logits[0, -1].argmax()))
    assert completion.token_ids == tuple(expected[8:])
    assert completion.token_ids != base.token_ids


@pytest.mark.parametrize(("memory", "merged"), [(10, True), (9, False)])
def test_copies_on_a_gpu_are_made_where_they_take_a_tenth_of_its_memory(
    memory: int, merged: bool, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = adapted(llama)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    options = {"num_sequences": 1, "num_tokens": 1}
    with_copies, without = (
        engine_bytes(policy, RolloutSettings(merge_lora=merge, block_size=16), cpu, **options)
        for merge in (True, False)
    )
    size = with_copies - without
    assert size > 0 and merges_adapters(policy, None, cpu)
    properties = SimpleNamespace(total_memory=memory * size)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert merges_adapters(policy, None, gpu) == merged
    assert engine_bytes(policy, RolloutSettings(block_size=16), gpu, **options) == (with_copies if merged else without)
    assert merges_adapters(policy, True, gpu) and not merges_adapters(policy, False, gpu)

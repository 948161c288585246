"""Every family of the Hub against `transformers`' plain torch code in float64 throughout: logits and gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignlab.models.decoder import hidden_states
from alignlab.models.hub.families import read_hub_config
from alignlab.models.transformer import PolicyForCausalLM
from tests.models.conftest import make_segments, sequences_of
from tests.models.test_parity import HUB, randomize
from tests.reference.float64 import grouped_product, really_float64

LIMIT = 1e-11
"""Of differences, relative to the largest number."""


def pair(name: str) -> tuple[PolicyForCausalLM, torch.nn.Module]:
    """Ours and that of `transformers`, of the same random weights; made and used within `really_float64`."""
    torch.manual_seed(0)
    hub = HUB[name]()
    hub._attn_implementation = hub._experts_implementation = "eager"
    theirs = AutoModelForCausalLM.from_config(hub).double().eval()
    randomize(theirs)
    config = read_hub_config(theirs.config)
    assert config is not None
    ours = PolicyForCausalLM(config).double().eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected and all(key.endswith("expert_load") for key in missing)
    return ours, theirs


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, name: str = "") -> None:
    assert ours.dtype == theirs.dtype == torch.float64
    assert (ours - theirs).abs().max() <= LIMIT * theirs.abs().max(), name


@pytest.mark.parametrize("name", HUB)
def test_logits_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", grouped_product)
    with really_float64():
        ours, theirs = pair(name)
        tokens = torch.randint(3, 61, (2, 24))
        outputs = [model(tokens, labels=tokens, use_cache=False) for model in (ours, theirs)]
        for output in outputs:
            output.loss.backward()
    assert_close(outputs[0].logits, outputs[1].logits)
    gradients = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for key, parameter in ours.named_parameters():
        assert_close(parameter.grad, gradients[key], key)


@pytest.mark.parametrize("name", HUB)
def test_packed_sequences_with_shared_prompts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours packs sequences and shares their prompts; `transformers` computes each sequence alone."""
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", grouped_product)
    segments = make_segments([(5, [3, 1, 6]), (7, []), (2, [4, 4])])
    with really_float64():
        ours, theirs = pair(name)
        tokens = torch.randint(3, 61, (segments.num_tokens,))
        weights = torch.randn(segments.num_tokens, 32, dtype=torch.float64)
        own = segments.sequence_of_token >= 0
        packed = hidden_states(ours, tokens, segments.position_ids, segments)
        (packed * weights)[own].sum().backward()
        for index in sequences_of(segments):
            states = theirs.model(tokens[index][None], use_cache=False).last_hidden_state[0]
            (states * weights[index])[own[index]].sum().backward()
            assert_close(packed[index][own[index]].detach(), states[own[index]].detach())
    gradients = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    for key, parameter in ours.named_parameters():
        assert (parameter.grad is None) == (gradients[key] is None), key
        if parameter.grad is not None:
            assert_close(parameter.grad, gradients[key], key)

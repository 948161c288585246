"""The embedded engine over every family of the Hub: its tokens and log-probs are those of `transformers`' own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignlab.models.hub.checkpoints import load_model
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.types import SamplingParams
from tests.models.test_parity import HUB, randomize
from tests.rollout.conftest import VOCAB, MakeEngine, flat, full_logprobs, make_prompts


def hub_model(name: str) -> Any:
    """A random model of `transformers`, with the vocabulary of the tests' tokenizer."""
    torch.manual_seed(0)
    config = HUB[name]()
    config.vocab_size, config.eos_token_id = VOCAB, None
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomize(model)
    return model


@pytest.mark.parametrize("name", HUB)
def test_greedy_tokens_are_those_of_transformers(name: str, make_engine: MakeEngine, tmp_path: Path) -> None:
    theirs, prompts = hub_model(name), make_prompts(1, 6, 16)
    theirs.save_pretrained(tmp_path)
    ours = load_model(str(tmp_path), dtype=torch.float32)
    assert type(ours) is PolicyForCausalLM
    sampling = SamplingParams(n=2, temperature=0.0, max_new_tokens=12, ignore_eos=True)
    completions = flat(make_engine(ours, prefill_tokens=7).generate(prompts, sampling))
    for index, completion in enumerate(completions):
        prompt = prompts[index // 2].token_ids
        rows = full_logprobs(theirs, (*prompt, *completion.token_ids))[len(prompt) - 1 : -1]
        assert completion.token_ids == tuple(rows.argmax(-1).tolist())
        torch.testing.assert_close(torch.tensor(completion.raw_logprobs), rows.max(-1).values, atol=3e-5, rtol=0)

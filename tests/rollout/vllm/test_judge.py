"""A judge on vLLM's own server gives the probabilities of our layers, and its texts can be read."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from alignlab.config.judge import EndpointJudge
from alignlab.rollout.vllm.access import server_token
from alignlab.rollout.vllm.protocol import SERVED_NAME, TOKEN_VARIABLE
from alignlab.scoring.judges.chat_model import Failure
from alignlab.scoring.judges.endpoint import EndpointChatModel
from alignlab.scoring.judges.local import LocalChatModel
from tests.rollout.vllm.conftest import DENSE, make_model

pytestmark = [pytest.mark.vllm, pytest.mark.distributed]

QUESTIONS = [[{"role": "user", "content": text}] for text in ("is it?", "1 or 2", "which one is better", "x")]
CHOICES = ("1", "2", "x")


@pytest.fixture(scope="module")
def tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tests' tokenizer with a chat template."""
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    return chatting


def test_vllms_probabilities_are_those_of_our_layers(
    serve: Callable[..., Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server returns 20 of 260 tokens; a choice that is not among them is bounded by the least likely of them."""
    model = make_model(DENSE)
    settings, [server] = serve(model)
    monkeypatch.setenv(TOKEN_VARIABLE, server_token())
    judge = EndpointJudge(
        url=f"{settings.servers[0]}/v1", model=SERVED_NAME, api_key_env=TOKEN_VARIABLE, max_attempts=1,
        request_timeout_s=60,
    )
    local = LocalChatModel(model, tokenizer).choose(QUESTIONS, CHOICES)
    served = EndpointChatModel(judge).choose(QUESTIONS, CHOICES)
    compared = 0
    for expected_choices, choices in zip(local, served, strict=True):
        if isinstance(choices, Failure):
            assert choices.kind == "nonsense"  # none of the choices is likely
            continue
        assert not isinstance(expected_choices, Failure)
        least = min(choices)
        for expected, logprob in zip(expected_choices, choices, strict=True):
            is_equal = logprob == pytest.approx(expected, abs=1e-4)
            assert is_equal or (logprob == least and expected <= least + 1e-4)
            compared += is_equal
    assert compared, "no choice was among the likeliest of any question: choose others"
    texts = EndpointChatModel(judge).write(QUESTIONS, max_new_tokens=4, temperature=1.0, seed=1)
    assert all(isinstance(text, str) for text in texts)
    assert texts == EndpointChatModel(judge).write(QUESTIONS, max_new_tokens=4, temperature=1.0, seed=1)

    monkeypatch.setenv(TOKEN_VARIABLE, "wrong")  # the key is read when the judge is made
    [refused] = EndpointChatModel(judge).choose(QUESTIONS[:1], CHOICES)
    assert isinstance(refused, Failure) and refused.kind == "unusable" and "401" in refused.message
    server.send_signal(signal.SIGKILL)
    [gone] = EndpointChatModel(judge).choose(QUESTIONS[:1], CHOICES)
    assert isinstance(gone, Failure) and gone.kind in ("unreachable", "timeout")

"""A judge behind vLLM's own server: its probabilities are those of our layers, and what it writes is read."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from alignlab.config.judge import EndpointJudge
from alignlab.rlaif.chat_model import Failure
from alignlab.rlaif.endpoint import EndpointChatModel
from alignlab.rlaif.local import LocalChatModel
from alignlab.rollout.vllm.server.access import SERVED_NAME, VARIABLE, server_token
from tests.rollout.vllm.conftest import DENSE, make_model

pytestmark = [pytest.mark.vllm, pytest.mark.distributed]

QUESTIONS = [[{"role": "user", "content": text}] for text in ("is it?", "1 or 2", "which one is better", "x")]
CHOICES = ("1", "2", "x")


@pytest.fixture(scope="module")
def tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tests' own, with a chat template."""
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    return chatting


def test_vllms_probabilities_are_those_of_our_layers(
    serve: Callable[..., Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vocabulary of 260, and the likeliest 20 are told: a choice that is not among them is bounded by the least."""
    model = make_model(DENSE)
    settings, [server] = serve(model)
    monkeypatch.setenv(VARIABLE, server_token())
    asked = EndpointJudge(
        url=f"{settings.servers[0]}/v1", model=SERVED_NAME, api_key_env=VARIABLE, max_attempts=1, request_timeout_s=60
    )
    local = LocalChatModel(model, tokenizer).choose(QUESTIONS, CHOICES)
    found = EndpointChatModel(asked).choose(QUESTIONS, CHOICES)
    compared = 0
    for ours, theirs in zip(local, found, strict=True):
        if isinstance(theirs, Failure):
            assert theirs.kind == "nonsense"  # none of the choices is likely
            continue
        assert not isinstance(ours, Failure)
        least = min(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert other == pytest.approx(one, abs=1e-4) or (other == least and one <= least + 1e-4)
            compared += other == pytest.approx(one, abs=1e-4)
    assert compared, "no choice was among the likeliest of any question: choose others"
    texts = EndpointChatModel(asked).write(QUESTIONS, max_new_tokens=4, temperature=1.0, seed=1)
    assert all(isinstance(text, str) for text in texts)
    assert texts == EndpointChatModel(asked).write(QUESTIONS, max_new_tokens=4, temperature=1.0, seed=1)

    monkeypatch.setenv(VARIABLE, "wrong")  # the key is read when the judge is made
    [refused] = EndpointChatModel(asked).choose(QUESTIONS[:1], CHOICES)
    assert isinstance(refused, Failure) and refused.kind == "unusable" and "401" in refused.message
    server.stop(signal.SIGKILL)
    [gone] = EndpointChatModel(asked).choose(QUESTIONS[:1], CHOICES)
    assert isinstance(gone, Failure) and gone.kind in ("unreachable", "timeout")

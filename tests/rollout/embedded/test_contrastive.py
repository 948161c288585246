"""Contrastive search against plain forward passes, one candidate at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from alignlab.errors import RolloutError
from alignlab.models.decoder import hidden_states
from alignlab.rollout.embedded.contrastive import ContrastiveParams, best_candidate
from alignlab.types import Segments
from tests.models.attention_kinds import make_model
from tests.rollout.conftest import END, VOCAB, MakeEngine, full_logprobs, make_prompts

SETTINGS: dict[str, dict[str, int]] = {
    "as it is": {}, "blocks of 1": {"block_size": 1}, "prompts in pieces": {"block_size": 4, "prefill_tokens": 3},
    "one prompt at a time": {"max_running": 4},
}  # fmt: skip


def states_of(model: PreTrainedModel, ids: tuple[int, ...]) -> torch.Tensor:
    segments = Segments.single(len(ids))
    with torch.no_grad():
        return hidden_states(model, torch.tensor(ids), segments.position_ids, segments)


def slow_search(model: PreTrainedModel, prompt: tuple[int, ...], params: ContrastiveParams) -> tuple[int, ...]:
    ids = prompt
    while len(ids) < len(prompt) + params.max_new_tokens:
        probs = full_logprobs(model, ids)[-1].exp()
        values = {}
        for token in probs.topk(params.num_candidates).indices.tolist():
            states = states_of(model, (*ids, token))
            likeness = torch.cosine_similarity(states[-1:], states[:-1]).max()
            values[token] = float((1 - params.penalty) * probs[token] - params.penalty * likeness)
        ids = (*ids, max(values, key=lambda token: values[token]))
        if ids[-1] == END:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["llama", "dense", "sparse", "gated-deltanet"])
def test_it_chooses_the_tokens_of_plain_forward_passes(
    name: str, make_engine: MakeEngine, request: pytest.FixtureRequest
) -> None:
    recurrent = name == "gated-deltanet"
    model = make_model(name, vocab_size=VOCAB, initializer_range=0.1) if recurrent else request.getfixturevalue(name)
    params, prompts = ContrastiveParams(num_candidates=3, max_new_tokens=4), make_prompts(3, 9)
    expected = [slow_search(model, prompt.token_ids, params) for prompt in prompts]
    for settings in SETTINGS.values():
        engine = make_engine(model, **settings)
        engine.contrastive_search(prompts, params)  # again: blocks of the prompts that are known hold no states
        for prompt, tokens, rollout in zip(prompts, expected, engine.contrastive_search(prompts, params), strict=True):
            [completion] = rollout.completions
            assert completion.token_ids == tokens
            rows = full_logprobs(model, (*prompt.token_ids, *tokens))[len(prompt.token_ids) - 1 : -1]
            own = rows.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            assert completion.raw_logprobs == completion.logprobs == pytest.approx(own.tolist(), abs=1e-4)
            assert completion.finish_reason == ("stop" if tokens[-1] == END else "length")
        assert engine._space.blocks.num_free == engine._space.blocks.num_blocks and engine.num_preempted == 0


def test_an_end_token_ends_it(make_engine: MakeEngine, llama: PreTrainedModel) -> None:
    params = ContrastiveParams(max_new_tokens=8)
    tokens = slow_search(llama, make_prompts(6)[0].token_ids, params)
    [rollout] = make_engine().contrastive_search(
        make_prompts(6), ContrastiveParams(max_new_tokens=8, stop_token_ids=(tokens[2],))
    )
    end = tokens.index(tokens[2]) + 1
    assert rollout.completions[0].token_ids == tokens[:end] and rollout.completions[0].finish_reason == "stop"


@pytest.mark.parametrize("kind", [{"penalty": 0.0}, {"num_candidates": 1}])
def test_without_a_penalty_or_a_choice_it_is_greedy(
    kind: dict[str, Any], make_engine: MakeEngine, llama: PreTrainedModel
) -> None:
    [rollout] = make_engine().contrastive_search(make_prompts(6), ContrastiveParams(max_new_tokens=6, **kind))
    ids = make_prompts(6)[0].token_ids
    for token in rollout.completions[0].token_ids:
        assert token == int(full_logprobs(llama, ids)[-1].argmax())
        ids = (*ids, token)


def test_a_choice_by_hand() -> None:
    """The likeliest candidate points where an earlier token does, the second at 60 degrees from one, the third away."""
    earlier = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    states = torch.tensor([[3.0, 0.0], [0.5, -(0.75**0.5)], [-2.0, -2.0]])
    probs = torch.tensor([0.6, 0.3, 0.1])
    # At 0.1: 0.44, 0.22, 0.161. At 0.5: -0.2, -0.1, 0.404.
    assert best_candidate(probs, states, earlier, penalty=0.1) == 0
    assert best_candidate(probs, states, earlier, penalty=0.5) == 2
    assert best_candidate(probs[:2], states[:2], earlier, penalty=0.5) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_candidates": 0}, r"contrastive\.num_candidates is 0, and must be from 1 to rollout\.max_running"),
        ({"penalty": 1.0}, r"contrastive\.penalty is 1\.0, and must be at least 0 and under 1"),
        ({"max_new_tokens": 0}, r"contrastive\.max_new_tokens is 0"),
    ],
)
def test_wrong_parameters_are_named(wrong: dict[str, Any], message: str, make_engine: MakeEngine) -> None:
    with pytest.raises(RolloutError, match=message):
        make_engine().contrastive_search(make_prompts(3), ContrastiveParams(**wrong))

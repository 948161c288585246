"""Log-probs of given tokens: several positions of a sequence get logits in one step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from alignlab.errors import RolloutError
from alignlab.rollout.embedded.runner import Runner
from alignlab.rollout.embedded.scheduler import Step
from alignlab.types import Completion, Prompt, Rollout, SamplingParams
from tests.rollout.conftest import VOCAB, MakeEngine, flat, full_logprobs, make_prompts

MODELS = ("llama", "dense", "sparse")
SCHEDULES: dict[str, dict] = {
    "one token a step": {"prefill_tokens": 1, "block_size": 5},
    "chunks of 3": {"prefill_tokens": 3},
    "few at a time": {"max_running": 2, "block_size": 4},
    "tiny cache": {"cache_tokens": 48, "block_size": 4, "prefill_tokens": 9},
    "nothing shared": {"share_prefixes": False},
}


def rollout_of(prompt: Prompt, *completions: tuple[int, ...]) -> Rollout:
    return Rollout(prompt, tuple(Completion.of(ids) for ids in completions))


def random_rollouts() -> list[Rollout]:
    """Prompts of 9, 16 and 1 tokens, each with completions that the model did not sample."""
    prompts, others = make_prompts(9, 16, 1), make_prompts(7, 1, 13, 6, 20, seed=1)
    a, b, c, d, e = (other.token_ids for other in others)
    return [rollout_of(prompts[0], a, b), rollout_of(prompts[1], c, d, c), rollout_of(prompts[2], e)]


@pytest.mark.parametrize("name", MODELS)
def test_given_tokens_have_the_logprobs_of_the_full_forward(
    name: str, make_engine: MakeEngine, request: pytest.FixtureRequest
) -> None:
    model: PreTrainedModel = request.getfixturevalue(name)
    rollouts = random_rollouts()
    logprobs = iter(make_engine(model, block_size=4).logprobs(rollouts))
    for rollout in rollouts:
        start = len(rollout.prompt.token_ids)
        for completion in rollout.completions:
            rows = full_logprobs(model, rollout.prompt.token_ids + completion.token_ids)[start - 1 : -1]
            expected = rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(next(logprobs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_sampled_tokens_get_the_same_logprobs_at_once_as_one_by_one(
    name: str, make_engine: MakeEngine, request: pytest.FixtureRequest
) -> None:
    engine = make_engine(request.getfixturevalue(name), block_size=4)
    rollouts = engine.generate(make_prompts(9, 16), SamplingParams(n=3, max_new_tokens=12, ignore_eos=True, seed=2))
    for completion, logprobs in zip(flat(rollouts), engine.logprobs(rollouts), strict=True):
        torch.testing.assert_close(logprobs, torch.tensor(completion.raw_logprobs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_scheduling_does_not_change_the_logprobs(
    schedule: str, make_engine: MakeEngine, dense: PreTrainedModel
) -> None:
    engine = make_engine(dense, **SCHEDULES[schedule])
    expected = make_engine(dense).logprobs(random_rollouts())
    for one, other in zip(expected, engine.logprobs(random_rollouts()), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert engine._space.blocks.num_free == engine._space.blocks.num_blocks


def test_a_completion_is_scored_in_one_step_and_its_prompt_once(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[Step] = []
    hidden = Runner.hidden
    monkeypatch.setattr(
        Runner, "hidden", lambda runner, step, *others: steps.append(step) or hidden(runner, step, *others)
    )
    engine = make_engine(block_size=4)
    [prompt] = make_prompts(16)
    engine.logprobs([rollout_of(prompt, (1, 2, 3, 4, 5, 6), (7, 8, 9), (10,))])
    assert [[(w.start, w.count, w.num_logits) for w in step.work] for step in steps] == [
        [(0, 16 + 5, 6)],
        [(12, 4 + 2, 3), (12, 4, 1)],  # 12: the token before the completion is computed again, for its logits
    ]


def test_completions_without_tokens(make_engine: MakeEngine) -> None:
    engine = make_engine()
    assert [len(logprobs) for logprobs in engine.logprobs([rollout_of(make_prompts(4)[0], (), (5, 6))])] == [0, 2]
    assert engine.logprobs([]) == []


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        (rollout_of(Prompt((), ""), (1,)), "prompt 0 has 0 tokens"),
        (rollout_of(Prompt((1,), ""), (2,), (3, -1)), "completion 1 of prompt 0 holds token -1, and each must be"),
        (rollout_of(Prompt((1,), ""), (2, VOCAB)), f"completion 0 of prompt 0 holds token {VOCAB}"),
        (rollout_of(Prompt((1,) * 100, ""), (2,) * 29), "has 129 tokens with its prompt, and must not exceed"),
    ],
)
def test_completions_that_cannot_be_scored_are_refused_before_work(
    rollout: Rollout, message: str, make_engine: MakeEngine
) -> None:
    engine = make_engine()
    with pytest.raises(RolloutError, match=message):
        engine.logprobs([rollout])
    assert engine.num_computed == 0


def test_the_longest_possible_completion_is_scored(make_engine: MakeEngine) -> None:
    [logprobs] = make_engine().logprobs([rollout_of(Prompt((1,) * 100, ""), (2,) * 28)])
    assert len(logprobs) == 28 and logprobs.isfinite().all()


def test_changed_weights_are_refused_and_taken_over(make_engine: MakeEngine, llama: PreTrainedModel) -> None:
    engine, rollouts = make_engine(), random_rollouts()
    before = engine.logprobs(rollouts)
    with torch.no_grad():
        llama.lm_head.weight.mul_(2)
    with pytest.raises(RolloutError, match="changed since version 0"):
        engine.logprobs(rollouts)
    engine.update_weights(1)
    after = engine.logprobs(rollouts)
    assert all((one - other).abs().max() > 0.01 for one, other in zip(before, after, strict=True))


def test_logits_that_are_not_finite_are_named(make_engine: MakeEngine, llama: PreTrainedModel) -> None:
    with torch.no_grad():
        llama.lm_head.weight[3, 0] = torch.nan
    with pytest.raises(RolloutError, match="the model's logits must be finite"):
        make_engine().logprobs(random_rollouts())


def test_scoring_and_sampling_share_prefixes(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=4)
    [rollout] = engine.generate(make_prompts(16), SamplingParams(max_new_tokens=9, ignore_eos=True, seed=0))
    before = engine.num_computed
    engine.logprobs([rollout])
    assert engine.num_computed == before + 4 + 8
    longer = replace(rollout.prompt, token_ids=rollout.prompt.token_ids + rollout.completions[0].token_ids)
    before = engine.num_computed
    engine.generate([longer], SamplingParams(max_new_tokens=1))
    assert engine.num_computed == before + 1

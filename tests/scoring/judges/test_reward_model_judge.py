"""A reward model as a judge: the odds of its rewards, in any order, over the texts as its tokenizer has them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from alignlab.config.trainers import RLAIFConfig
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.errors import ConfigError
from alignlab.scoring.judges.reward_model_judge import RewardModelJudge


class LengthReward:
    """A reward a token of the completion, the end token included."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, *, prompt_ids: Any, completion_ids: Any) -> list[float]:
        self.seen += list(zip(prompt_ids, completion_ids, strict=True))
        return [float(len(ids)) for ids in completion_ids]


def test_the_odds_of_a_pair_follow_from_the_rewards() -> None:
    tokenizer = train_tokenizer(["a"], vocab_size=258)
    reward: Any = LengthReward()
    judge = RewardModelJudge(reward, tokenizer)
    longer, equal, shorter = judge.compare([("q", "xyz", "x"), ("q", "xx", "yy"), ("q", "x", "xyz")])
    assert longer.probability == pytest.approx(1 / (1 + math.exp(-2))) and equal.probability == 0.5
    assert shorter.probability == pytest.approx(1 - longer.probability)
    assert longer.by_order == ((longer.probability, longer.probability),)
    prompt, completion = reward.seen[0]
    assert tokenizer.decode(prompt) == "q" and completion[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(completion[:-1]) == "xyz"
    assert judge.rate([("q", "x")]) == [pytest.approx(1 / (1 + math.exp(-2)))]
    assert judge.counts == {"asked": 7, "answered": 7, "refused": 0}


def test_a_text_that_cannot_be_rendered_has_no_verdict() -> None:
    judge = RewardModelJudge(LengthReward(), train_tokenizer(["a"], vocab_size=258))  # type: ignore[arg-type]
    chat = [{"role": "user", "content": "q"}]
    with pytest.raises(ConfigError, match="chat messages, and prompts are plain here"):
        judge.compare([(chat, "a", "b")])


def test_a_reward_model_as_judge_is_refused_for_revision() -> None:
    with pytest.raises(ConfigError, match=r"judge\.backend is .* must be model or endpoint with revision"):
        RLAIFConfig(constitution="c", path="revision", judge={"backend": "reward_model", "name": "x"})

"""A constitution, and a judge's model that answers by a rule."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from alignlab.config.judge import Constitution, ModelJudge, Principle
from alignlab.scoring.judges.chat_model import Conversation, Failure
from alignlab.scoring.judges.judge import PromptedJudge
from alignlab.types import Completion, Prompt, Rollout


def principle(name: str) -> Principle:
    return Principle(
        name=name, prefer=f"Which is more {name}?", rate=f"How {name}?", critique=f"Not {name}?", revise=f"Be {name}."
    )


CONSTITUTION = Constitution(name="test", principles=tuple(principle(name) for name in ("long", "odd", "calm")))


def shown(conversation: Conversation) -> list[str]:
    """The answers that a question shows."""
    return re.findall(r"^Answer(?: \d)?: (.*)$", str(conversation[0]["content"]), flags=re.MULTILINE)


class RuledModel:
    """Prefers the longer answer by its share of the characters, and what is shown first by `bias` nats more.

    Attributes:
        asked: conversations, in order.
        texts: what `write` gives, one after the other.
    """

    identity = "ruled"
    num_retries = 0

    def __init__(self, *, bias: float = 0.0, texts: Sequence[str | Failure] = ()) -> None:
        self.bias, self.texts = bias, deque(texts)
        self.asked: list[Conversation] = []

    def choose(
        self, conversations: Sequence[Conversation], choices: Sequence[str]
    ) -> list[tuple[float, ...] | Failure]:
        self.asked += conversations
        return [self._choose(shown(conversation), choices) for conversation in conversations]

    def _choose(self, answers: list[str], choices: Sequence[str]) -> tuple[float, ...] | Failure:
        if "mute" in answers:
            return Failure("nonsense", "it says nothing")
        if len(answers) == 1:  # a rating: the length, with certainty
            return tuple(0.0 if len(answers[0]) == int(choice) else -1e9 for choice in choices)
        return math.log(len(answers[0])) + self.bias, math.log(len(answers[1]))

    def write(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[str | Failure]:
        self.asked += conversations
        return [self.texts.popleft() for _ in conversations]


@pytest.fixture
def make_judge() -> Callable[..., PromptedJudge]:
    def make(model: Any = None, store: Any = None, **settings: Any) -> PromptedJudge:
        return PromptedJudge(model or RuledModel(), CONSTITUTION, ModelJudge(**settings), store)

    return make


def rollout(index: int, *texts: str, prompt: Any = None) -> Rollout:
    completions = tuple(Completion.of((1,), text) for text in texts)
    return Rollout(Prompt((1,), prompt or f"question {index}", index=index), completions)

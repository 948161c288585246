"""A reward model as a judge: the odds of a pair follow from the two rewards (Bradley and Terry, 1952)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from alignlab.config.data import RenderSettings
from alignlab.data.bad_row import BadRow
from alignlab.data.examples import completion_example
from alignlab.data.rendering import PromptRenderer
from alignlab.scoring.judges.judge import Verdict
from alignlab.scoring.reward_model import ModelReward
from alignlab.types import Text


class RewardModelJudge:
    """Compares and rates with a reward model; the order of a pair does not matter.

    Args:
        reward: the reward model.
        tokenizer: the reward model's tokenizer.

    Attributes:
        counts: completions asked, answered, and refused (by the chat template).
    """

    def __init__(self, reward: ModelReward, tokenizer: PreTrainedTokenizerBase) -> None:
        self.counts: Counter[str] = Counter()
        self._reward = reward
        self._render = PromptRenderer(RenderSettings(), tokenizer, needs_thoughts=False)

    def compare(self, pairs: Sequence[tuple[Text, str, str]]) -> list[Verdict]:
        """Return p(first is better) = sigmoid(reward of the first - reward of the second) for each pair."""
        rewards = self._rewards([(prompt, text) for prompt, first, second in pairs for text in (first, second)])
        verdicts = []
        for first, second in zip(rewards[0::2], rewards[1::2], strict=True):
            probability = None if first is None or second is None else _sigmoid(first - second)
            verdicts.append(Verdict(probability, ((probability, probability),)))
        return verdicts

    def rate(self, answers: Sequence[tuple[Text, str]]) -> list[float | None]:
        """Return sigmoid(reward): the probability against a completion of reward 0, the mean of centred rewards."""
        return [None if reward is None else _sigmoid(reward) for reward in self._rewards(answers)]

    def _rewards(self, answers: Sequence[tuple[Text, str]]) -> list[float | None]:
        """Return each completion's reward; None for one that the chat template refuses."""
        rendered: dict[int, tuple[list[int], list[int]]] = {}
        for i, (prompt, text) in enumerate(answers):
            try:
                example = completion_example(prompt, text, self._render)
            except BadRow:
                continue
            start = example.completion_mask.index(True)
            rendered[i] = list(example.token_ids[:start]), list(example.token_ids[start:])
        self.counts.update(asked=len(answers), answered=len(rendered), refused=len(answers) - len(rendered))
        prompts, completions = ([ids[which] for ids in rendered.values()] for which in (0, 1))
        values = self._reward(prompt_ids=prompts, completion_ids=completions) if rendered else []
        reward_of = dict(zip(rendered, values, strict=True))
        return [reward_of.get(i) for i in range(len(answers))]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))

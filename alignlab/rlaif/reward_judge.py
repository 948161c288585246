"""A reward model as a judge: the odds of a pair are those of its rewards (Bradley and Terry, 1952)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from alignlab.config.render import RenderSettings
from alignlab.data.examples import completion_example
from alignlab.data.messages import BadRow
from alignlab.data.rendering import PromptRenderer
from alignlab.rlaif.judge import Verdict
from alignlab.training.model_reward import ModelReward
from alignlab.types import Text


class RewardModelJudge:
    """Compares and rates by a reward model; a pair has no order to it, and texts are tokenised by its own tokenizer.

    Args:
        reward: the model.
        tokenizer: its own.

    Attributes:
        counts: of completions: asked, answered, refused (by the chat template).
    """

    def __init__(self, reward: ModelReward, tokenizer: PreTrainedTokenizerBase) -> None:
        self.counts: Counter[str] = Counter()
        self._reward = reward
        self._render = PromptRenderer(RenderSettings(), tokenizer, needs_thoughts=False)

    def compare(self, pairs: Sequence[tuple[Text, str, str]]) -> list[Verdict]:
        """p(first is better) = sigmoid(reward of the first - reward of the second)."""
        rewards = self._rewards([(prompt, text) for prompt, *both in pairs for text in both])
        verdicts = []
        for first, second in zip(rewards[0::2], rewards[1::2], strict=True):
            known = None if first is None or second is None else _sigmoid(first - second)
            verdicts.append(Verdict(known, ((known, known),)))
        return verdicts

    def rate(self, answers: Sequence[tuple[Text, str]]) -> list[float | None]:
        """sigmoid(reward): the odds against a completion of reward 0, which is the mean where rewards were centred."""
        return [None if reward is None else _sigmoid(reward) for reward in self._rewards(answers)]

    def _rewards(self, answers: Sequence[tuple[Text, str]]) -> list[float | None]:
        rendered: dict[int, tuple[list[int], list[int]]] = {}
        for i, (prompt, text) in enumerate(answers):
            try:
                example = completion_example(prompt, text, self._render)
            except BadRow:
                continue
            start = example.completion_mask.index(True)
            rendered[i] = list(example.token_ids[:start]), list(example.token_ids[start:])
        self.counts.update(asked=len(answers), answered=len(rendered), refused=len(answers) - len(rendered))
        prompts, completions = ([both[part] for both in rendered.values()] for part in (0, 1))
        values = iter(self._reward(prompt_ids=prompts, completion_ids=completions) if rendered else ())
        return [next(values) if i in rendered else None for i in range(len(answers))]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))

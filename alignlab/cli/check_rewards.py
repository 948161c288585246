"""The reward part of `alignlab check`: each reward is tried on one row's own answer and on a wrong one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alignlab.config.rewards import RewardLimits
    from alignlab.run_from_config import CheckedRun
    from alignlab.scoring.loading import LoadedReward
    from alignlab.types import Prompt, Rollout

WRONG_ANSWER = "I do not know."


def reward_lines(checked: CheckedRun) -> Iterator[str]:
    """Yield each reward's values for the first prompt, and where accuracy may stay 0.

    The rewards are loaded anew, because those of the trainer belong to a model without weights.

    Raises:
        ConfigError: a reward cannot be loaded.
        RewardError: a function fails.
    """
    from alignlab.scoring.loading import load_reward
    from alignlab.types import Prompt

    config, preflight = checked.config, checked.preflight
    rewards = [load_reward(settings) for settings in config.rewards]
    scorer = config.evaluation.scorer_settings
    scorers = rewards[:1] if scorer is None else [load_reward(scorer)]
    prompts = [item for item in (*preflight.train, *preflight.held_out) if isinstance(item, Prompt)]
    for prompt in prompts[:1]:
        yield from _values([*rewards, *(scorers if scorer else [])], prompt, checked)
        if rewards:
            yield from _accuracy_note(scorers[0], prompt, checked)


def _values(rewards: Sequence[LoadedReward], prompt: Prompt, checked: CheckedRun) -> Iterator[str]:
    """Yield each reward's values of the row's own answer and of a wrong one."""
    from alignlab.config.rewards import RewardLimits
    from alignlab.config.trainers import OnlineConfig, stages_of

    online = [stage for stage in stages_of(checked.config.trainer) if isinstance(stage, OnlineConfig)]
    limits = online[-1].reward_limits if online else RewardLimits()
    scored = _score(rewards, limits, _rollout(prompt, [*_own_answer(prompt), WRONG_ANSWER], checked.tokenizer))
    for name, values in scored.reward_parts.items():
        parts = [f"{value} for {answer.text!r}" for value, answer in zip(values, scored.completions, strict=True)]
        silent = "; it applies to neither" if all(value is None for value in values) else ""
        yield f"{name}: {', '.join(parts)}{silent}"


def _accuracy_note(scorer: LoadedReward, prompt: Prompt, checked: CheckedRun) -> Iterator[str]:
    """Yield a note if the scorer does not accept a row's own answer."""
    value = value_of_own_answer(scorer, prompt, checked.tokenizer)
    if value is not None and value != 1.0:
        yield f"{scorer.name} gives {value} to the row's own answer: accuracy, which counts 1 alone, may stay 0"


def value_of_own_answer(reward: LoadedReward, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> float | None:
    """Return a reward's value of the row's own answer; None if there is no answer, or the reward does not apply.

    Raises:
        RewardError: the function fails.
    """
    from alignlab.config.rewards import RewardLimits

    answer = _own_answer(prompt)
    if not answer:
        return None
    return _score([reward], RewardLimits(), _rollout(prompt, answer, tokenizer)).reward_parts[reward.name][0]


def _score(rewards: Sequence[LoadedReward], limits: RewardLimits, rollout: Rollout) -> Rollout:
    """Return the rollout with its rewards.

    Raises:
        RewardError: a function fails.
    """
    from alignlab.errors import RewardError
    from alignlab.scoring.runner import RewardRunner

    runner = RewardRunner(rewards, limits.model_copy(update={"max_failures": len(rewards)}))
    try:
        [scored] = runner.score([rollout])
    finally:
        runner.close()
    failures = [f"{name} ({kind})" for name, kind in runner.failures]
    if failures:
        raise RewardError(f"rewards failed on the first row: {', '.join(failures)}; see the warnings above")
    return scored


def _own_answer(prompt: Prompt) -> list[str]:
    return [str(prompt.columns["answer"])] if "answer" in prompt.columns else []


def _rollout(prompt: Prompt, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Rollout:
    """Return a rollout with these completions, as an engine would."""
    from alignlab.types import Completion, Rollout

    ids = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return Rollout(prompt, tuple(Completion.of(row, text) for row, text in zip(ids, texts, strict=True)))

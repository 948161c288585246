"""The reward part of `alignlab check`: each reward is tried on one row's own answer and on a wrong one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from alignlab.cli.checked_run import CheckedRun

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alignlab.config.rewards import RewardLimits
    from alignlab.scoring.loading import LoadedReward
    from alignlab.types import Prompt, Rollout

WRONG_ANSWER = "I do not know."


def reward_lines(run: CheckedRun) -> Iterator[str]:
    """Yield each reward's values for the first row, and where accuracy may stay 0.

    Raises:
        ConfigError: a reward needs a column that the data do not have, all weigh nothing, or a reward model does not
            read the policy's tokens.
        CheckpointError: the weights of a reward model do not fit its config.
        RewardError: a function fails.
    """
    held_out = run.held_out_rows.prompts if run.held_out_rows else ()
    _check_columns(run, held_out)
    for prompt in [*run.training_rows.prompts, *held_out][:1]:
        yield from _values(run, prompt)
        yield from _accuracy_notes(run, prompt)


def _check_columns(run: CheckedRun, held_out: Sequence[Prompt]) -> None:
    from alignlab.loop.reward_checks import check_weights
    from alignlab.scoring.columns import check_columns

    check_weights(run.rewards, needed=run.config.trainer.takes_rewards == "needed")
    if run.training_rows.prompts:
        check_columns(run.rewards, run.training_rows.prompts, data="the training data")
    if held_out:
        check_columns([run.scorer] if run.scorer else [], held_out, data="the evaluation data")


def _values(run: CheckedRun, prompt: Prompt) -> Iterator[str]:
    """Yield each reward's values of the row's own answer and of a wrong one."""
    from alignlab.config.rewards import RewardLimits
    from alignlab.models.hub.reward_checkpoints import check_reward_model
    from alignlab.scoring.reward_model import ModelReward

    limits = run.online_stages[-1].reward_limits if run.online_stages else RewardLimits()
    extra = [] if run.config.evaluation.scorer is None else [run.scorer]
    rewards = [*run.rewards, *filter(None, extra)]
    for reward in rewards:
        if isinstance(reward.function, ModelReward):
            reward.function.check_tokenizer(run.tokenizer)
            check_reward_model(reward.function.path)
    scored = _score(rewards, limits, _rollout(prompt, [*_own_answer(prompt), WRONG_ANSWER], run.tokenizer))
    for name, values in scored.reward_parts.items():
        parts = [f"{value} for {answer.text!r}" for value, answer in zip(values, scored.completions, strict=True)]
        silent = "; it applies to neither" if all(value is None for value in values) else ""
        yield f"{name}: {', '.join(parts)}{silent}"


def _accuracy_notes(run: CheckedRun, prompt: Prompt) -> Iterator[str]:
    """Yield a note if the scorer does not accept a row's own answer."""
    from alignlab.evaluation.evaluate import require_scorer

    scorer = run.scorer
    if not run.rewards or scorer is None:
        return
    if run.config.evaluation_data is not None:
        require_scorer(scorer)
    value = value_of_own_answer(scorer, prompt, run.tokenizer)
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

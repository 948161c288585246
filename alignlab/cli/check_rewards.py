"""What `alignlab check` says of a config's rewards: each is tried on one row's own answer and on a wrong one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alignlab.config.rewards import RewardLimits
    from alignlab.config.run import RunConfig
    from alignlab.training.reward_functions import LoadedReward
    from alignlab.types import Prompt, Rollout

WRONG_ANSWER = "I do not know."


def try_rewards(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], held_out: Sequence[Prompt]
) -> Iterator[str]:
    """What each reward gives to the first prompt, and where accuracy would stay 0.

    Raises:
        ConfigError: a reward needs a column that the data do not have, or all weigh nothing.
        RewardError: a function fails.
    """
    check_data(config, prompts, held_out)
    for prompt in [*prompts, *held_out][:1]:
        yield from values_of(config, prompt, tokenizer)
        yield from answer_notes(config, prompt, tokenizer)


def check_data(config: RunConfig, prompts: Sequence[Prompt], held_out: Sequence[Prompt]) -> None:
    """Refuse rewards that can never work on the data, as the training would.

    Raises:
        ConfigError: one needs a column that the data do not have, or all weigh nothing.
    """
    from alignlab.config.rewards import RewardSettings
    from alignlab.trainers.reward_evidence import check_weights
    from alignlab.training.reward_columns import check_columns
    from alignlab.training.reward_functions import load_reward

    rewards = [load_reward(reward) for reward in config.rewards]
    check_weights(rewards, needed=config.trainer.takes_rewards == "needed")
    if prompts:
        check_columns(rewards, prompts, data="the training data")
    named = config.evaluation.scorer
    scorer = [load_reward(RewardSettings(name=named))] if named else rewards[:1]
    if held_out:
        check_columns(scorer, held_out, data="the evaluation data")


def values_of(config: RunConfig, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Each reward's value of a row's own answer and of a wrong one."""
    from alignlab.config.rewards import RewardLimits, RewardSettings
    from alignlab.config.trainers import OnlineConfig, stages_of
    from alignlab.training.reward_functions import load_reward

    online = [stage.reward_limits for stage in stages_of(config.trainer) if isinstance(stage, OnlineConfig)]
    scorer = (RewardSettings(name=config.evaluation.scorer),) if config.evaluation.scorer else ()
    rewards = [load_reward(each) for each in (*config.rewards, *scorer)]
    check_tokenizers(rewards, tokenizer)
    texts = [str(prompt.columns["answer"])] if "answer" in prompt.columns else []
    rollout = sample_rollout(prompt, [*texts, WRONG_ANSWER], tokenizer)
    scored = score_once(rewards, online[-1] if online else RewardLimits(), rollout)
    for name, values in scored.reward_parts.items():
        told = [f"{value} for {c.text!r}" for value, c in zip(values, scored.completions, strict=True)]
        silent = "; it applies to neither" if all(value is None for value in values) else ""
        yield f"{name}: {', '.join(told)}{silent}"


def check_tokenizers(rewards: Sequence[LoadedReward], tokenizer: PreTrainedTokenizerBase) -> None:
    """See that reward models read the policy's tokens.

    Raises:
        ConfigError: one does not.
    """
    from alignlab.training.model_reward import ModelReward

    for reward in rewards:
        if isinstance(reward.function, ModelReward):
            reward.function.check_tokenizer(tokenizer)


def score_once(rewards: Sequence[LoadedReward], limits: RewardLimits, rollout: Rollout) -> Rollout:
    """The rollout with its rewards.

    Raises:
        RewardError: a function fails.
    """
    from alignlab.errors import RewardError
    from alignlab.training.reward_runner import RewardRunner

    runner = RewardRunner(rewards, limits.model_copy(update={"max_failures": len(rewards)}))
    try:
        [scored] = runner.score([rollout])
    finally:
        runner.close()
    wrong = [f"{name} ({kind})" for name, kind in runner.failures]
    if wrong:
        raise RewardError(f"rewards failed on the first row: {', '.join(wrong)}; see the warnings above")
    return scored


def value_of_own_answer(reward: LoadedReward, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> float | None:
    """What a reward gives to the row's own answer; None where the row has none, or the reward does not apply."""
    from alignlab.config.rewards import RewardLimits

    if "answer" not in prompt.columns:
        return None
    rollout = sample_rollout(prompt, [str(prompt.columns["answer"])], tokenizer)
    return score_once([reward], RewardLimits(), rollout).reward_parts[reward.name][0]


def sample_rollout(prompt: Prompt, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Rollout:
    """A rollout that says `texts`, as an engine would return it."""
    from alignlab.types import Completion, Rollout

    completions = []
    for text in texts:
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        zeros = (0.0,) * len(ids)
        completions.append(Completion(ids, text, zeros, zeros, "stop", (0,) * len(ids)))
    return Rollout(prompt, tuple(completions))


def answer_notes(config: RunConfig, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Whether the reward that says what is right takes a row's own answer for right."""
    from alignlab.config.rewards import RewardSettings
    from alignlab.trainers.run import evaluation_data
    from alignlab.training.evaluation import require_scorer
    from alignlab.training.reward_functions import load_reward

    if not config.rewards:
        return
    named = config.evaluation.scorer
    scorer = load_reward(RewardSettings(name=named) if named else config.rewards[0])
    if evaluation_data(config) is not None:
        require_scorer(scorer)
    value = value_of_own_answer(scorer, prompt, tokenizer)
    if value is not None and value != 1.0:
        yield f"{scorer.name} gives {value} to the row's own answer: accuracy, which counts 1 alone, may stay 0"

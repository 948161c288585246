"""Judges made from settings."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedTokenizerBase

from alignlab.config.judge import Constitution, EndpointJudge, JudgeSettings, ModelJudge, PromptedSettings, RewardJudge
from alignlab.errors import ConfigError
from alignlab.files.paths import judge_answers_file
from alignlab.models.hub.checkpoints import load_tokenizer
from alignlab.scoring.judges.answer_cache import AnswerStore
from alignlab.scoring.judges.chat_model import ChatModel
from alignlab.scoring.judges.endpoint import EndpointChatModel
from alignlab.scoring.judges.judge import Judge, PromptedJudge
from alignlab.scoring.judges.local import load_local
from alignlab.scoring.judges.reward_model_judge import RewardModelJudge
from alignlab.scoring.reward_model import ModelReward


def make_judge(
    settings: JudgeSettings,
    constitution: Constitution,
    *,
    policy: nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
) -> Judge:
    """Return the judge that the settings describe; the answers of a chat model are stored on disk.

    Args:
        settings: the judge's section.
        constitution: the principles.
        policy, tokenizer: the policy, whose frozen base judges where the settings name no model.
        seed: seed of the choice of principles and of sampled answers.

    Raises:
        ConfigError: the model cannot be loaded or reached, or see `check_votes`.
    """
    if isinstance(settings, RewardJudge):
        return RewardModelJudge(ModelReward(settings.name), load_tokenizer(settings.name))
    check_votes(settings, constitution)
    store = AnswerStore(judge_answers_file()) if settings.cache else None
    return PromptedJudge(chat_model(settings, policy, tokenizer), constitution, settings, store, seed)


def describe(settings: JudgeSettings) -> str:
    """Return a line about a judge."""
    place = f"{settings.model} at {settings.url}" if isinstance(settings, EndpointJudge) else settings.name
    place = place or "the policy's own base"
    votes = "" if isinstance(settings, RewardJudge) else f", {settings.answers}, {settings.votes} votes a pair"
    return f"{settings.backend}: {place}{votes}; alignlab judge says how good it is"


def check_votes(settings: PromptedSettings, constitution: Constitution) -> None:
    """Raise if a question would be asked twice with the same answer.

    Raises:
        ConfigError: there are more votes than principles, and the judge answers with probabilities, which are the same
            each time.
    """
    principles = len(constitution.principles)
    if settings.answers == "probabilities" and settings.votes > principles:
        raise ConfigError(
            f"judge.votes is {settings.votes}, and must be at most the {principles} principles of {constitution.name} "
            f"with answers: probabilities, which are the same each time; use {principles}, or answers: sampled"
        )


def chat_model(
    settings: PromptedSettings, policy: nn.Module | None, tokenizer: PreTrainedTokenizerBase | None
) -> ChatModel:
    """Return the model that the settings describe."""
    if isinstance(settings, EndpointJudge):
        return EndpointChatModel(settings)
    return load_local(settings, policy, tokenizer)


def shares_base(settings: JudgeSettings) -> bool:
    """Return whether the policy's own base judges."""
    return isinstance(settings, ModelJudge) and settings.name is None

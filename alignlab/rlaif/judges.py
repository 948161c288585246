"""The judge that the settings describe."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedTokenizerBase

from alignlab.config.constitution import Constitution
from alignlab.config.judge import EndpointJudge, JudgeSettings, ModelJudge, PromptedSettings, RewardJudge
from alignlab.errors import ConfigError
from alignlab.models.checkpoints import load_tokenizer
from alignlab.models.packaged import cache_folder
from alignlab.rlaif.answers import AnswerStore
from alignlab.rlaif.chat_model import ChatModel
from alignlab.rlaif.endpoint import EndpointChatModel
from alignlab.rlaif.judge import Judge, PromptedJudge
from alignlab.rlaif.local import load_local
from alignlab.rlaif.reward_judge import RewardModelJudge
from alignlab.training.model_reward import ModelReward


def make_judge(
    settings: JudgeSettings,
    constitution: Constitution,
    *,
    policy: nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
) -> Judge:
    """A judge; one that is asked has its answers on disk.

    Args:
        policy, tokenizer: whose frozen base judges where the settings name no model.

    Raises:
        ConfigError: the model cannot be had; or there are more votes than principles, and the same question has the
            same probabilities each time.
    """
    if isinstance(settings, RewardJudge):
        return RewardModelJudge(ModelReward(settings.name), load_tokenizer(settings.name))
    check_votes(settings, constitution)
    store = AnswerStore(cache_folder() / "judge" / "answers.sqlite") if settings.cache else None
    return PromptedJudge(chat_model(settings, policy, tokenizer), constitution, settings, store, seed)


def check_votes(settings: PromptedSettings, constitution: Constitution) -> None:
    """See that no vote is cast twice.

    Raises:
        ConfigError: it is.
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
    """What the settings say is asked."""
    if isinstance(settings, EndpointJudge):
        return EndpointChatModel(settings)
    return load_local(settings, policy, tokenizer)


def shares_base(settings: JudgeSettings) -> bool:
    """Whether the policy's own base judges."""
    return isinstance(settings, ModelJudge) and settings.name is None

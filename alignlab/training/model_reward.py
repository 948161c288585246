"""A reward model as a reward function, on the policy's own frozen base where that is the base it was trained on.

What is scored is exactly what was sampled: the ids of prompt and completion as they are. A completion that the length
limit cut off has no end token, and is scored without one.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from alignlab.data.packing import pack_rollouts
from alignlab.data.vocabulary import check_ids
from alignlab.digests import digest_of_values
from alignlab.errors import ConfigError
from alignlab.models.attention import num_embeddings, num_positions
from alignlab.models.checkpoints import load_tokenizer
from alignlab.models.computed import model_settings
from alignlab.models.reward_checkpoints import is_reward_model, known_base, load_reward_model, load_reward_role
from alignlab.models.reward_model import RewardModel
from alignlab.models.template_limits import render_template
from alignlab.training.checkpoint import fingerprint
from alignlab.training.reference_cache import digest_of_model
from alignlab.training.reward_calls import CallerReward
from alignlab.types import Completion, Prompt, Rollout

if TYPE_CHECKING:
    from alignlab.training.reward_functions import LoadedReward

logger = logging.getLogger(__name__)

ROLE = "reward"
_CONVERSATION = [{"role": "user", "content": "What is 7 + 5?"}, {"role": "assistant", "content": " It's 12.\n"}]


class ModelReward(CallerReward):
    """The reward of each completion by a reward model; the plug-in `reward_model`.

    A trainer binds it to its policy. Unbound, it loads the model at the first call, and takes the ids as they are.

    Args:
        model: a local folder: what trainer type reward writes, a `...ForSequenceClassification` of one label, or PEFT's
            adapter for one.
        tokens_per_microbatch: tokens in one forward pass; changes memory and speed, never a reward.

    Raises:
        ConfigError: the folder holds no reward model, or an option is out of range.
    """

    def __init__(self, model: str, tokens_per_microbatch: int = 4096) -> None:
        if not isinstance(model, str) or not is_reward_model(model):
            raise ConfigError(
                f"the option model of a reward must be a local folder of a reward model, and {model!r} is none; train "
                "one with trainer.type reward, and give its adapter or model folder"
            )
        if not isinstance(tokens_per_microbatch, int) or tokens_per_microbatch < 1:
            raise ConfigError(
                f"the option tokens_per_microbatch of a reward must be a whole number, at least 1, and is "
                f"{tokens_per_microbatch!r}; use 4096"
            )
        self.__name__ = "reward_model"
        self.path = model
        self.budget = tokens_per_microbatch
        self._reward: RewardModel | None = None

    @property
    def shares_policy(self) -> bool:
        """Whether it is a role on the policy's base, and holds no copy of one."""
        return self._reward is not None and self._reward.role is not None

    def bind(self, policy: nn.Module, tokenizer: PreTrainedTokenizerBase, *, share: bool, role: str = ROLE) -> None:
        """Be ready to score this policy's completions: on its base, if that is the same to the last byte, or beside it.

        Args:
            policy: the model in training.
            tokenizer: the policy's.
            share: whether the policy's model may be switched to another role while a completion is scored: not where
                completions are scored in another thread than the training's.
            role: what its adapter is called on the policy's base.

        Raises:
            ConfigError: the tokenizers differ.
        """
        self.check_tokenizer(tokenizer)
        base = known_base(self.path)
        if share and base is not None and isinstance(policy, PeftModel) and base == digest_of_model(policy):
            self._reward = load_reward_role(policy, self.path, role)
            return
        why = "it is not known to be trained on the policy's frozen base" if share else "rollouts are made ahead"
        logger.info("the reward model %s is loaded beside the policy: %s", self.path, why)
        self._reward = load_reward_model(self.path, device=next(policy.parameters()).device)

    @property
    def num_rows(self) -> int:
        """Rows of the embedding table of the reward model, which is bound."""
        assert self._reward is not None
        return num_embeddings(self._reward.model)

    def fingerprint(self) -> str:
        """Of the weights that are the reward model's own, wherever they are held; it is bound."""
        reward = self._reward
        assert reward is not None
        if not isinstance(reward.model, PeftModel):
            return digest_of_values([fingerprint(reward.named_parameters()), model_settings(reward.model)])
        part = f".{reward.role or reward.model.active_adapter}."
        return fingerprint(
            (name.replace(part, "."), weight)
            for name, weight in sorted(reward.named_parameters())
            if part in name or name.startswith("score.")
        )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """See that ids mean the same to the policy and to the reward model.

        Raises:
            ConfigError: they do not.
        """
        own = load_tokenizer(self.path)
        difference = _difference(own, tokenizer)
        if difference is not None:
            raise ConfigError(
                f"the reward model {self.path} scores the policy's token ids, and its tokenizer ({own.name_or_path}) "
                f"is not the policy's ({tokenizer.name_or_path}): {difference}; train the reward model on the policy's "
                "base and tokenizer"
            )

    def __call__(
        self, *, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float | None]:
        """The reward of each completion; None for one without a token, with more than the model has positions, or with
        one that it has no embedding for."""
        if self._reward is None:
            self._reward = load_reward_model(self.path, device="cuda" if torch.cuda.is_available() else "cpu")
        limit = num_positions(self._reward.model)
        rows = num_embeddings(self._reward.model)
        fits = [
            len(p) + len(c) <= limit and max((*p, *c), default=0) < rows
            for p, c in zip(prompt_ids, completion_ids, strict=True)
        ]
        read = [ids if fit else () for ids, fit in zip(completion_ids, fits, strict=True)]
        packs = pack_rollouts(_groups(prompt_ids, read), budget=self.budget)
        values = self._reward.rewards(packs, len(read)).tolist()
        return [value if ids else None for value, ids in zip(values, read, strict=True)]


def bind_rewards(
    rewards: Sequence[LoadedReward], policy: nn.Module, tokenizer: PreTrainedTokenizerBase, *, share: bool
) -> None:
    """Bind the reward models among reward functions, each as a role of its own; see `ModelReward.bind`."""
    models = [reward.function for reward in rewards if isinstance(reward.function, ModelReward)]
    for number, model in enumerate(models):
        model.bind(policy, tokenizer, share=share, role=f"{ROLE}_{number}" if number else ROLE)


def check_reward_ids(
    rewards: Sequence[LoadedReward], prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise if a reward model among reward functions, which is bound, has no embedding for a token of a prompt.

    Raises:
        ConfigError: with the prompt's number and the token.
    """
    for reward in rewards:
        if isinstance(reward.function, ModelReward):
            rows = {f"the reward model {reward.function.path}": reward.function.num_rows}
            check_ids(((prompt.token_ids,) for prompt in prompts), rows, tokenizer, what="prompt")


def fingerprints_of(rewards: Sequence[LoadedReward]) -> dict[str, str]:
    """Of the reward models among reward functions, which are bound, by what they are; see `TrainingLoop.frozen`."""
    models = [reward.function for reward in rewards if isinstance(reward.function, ModelReward)]
    return {f"reward model {number}": model.fingerprint() for number, model in enumerate(models, start=1)}


def _groups(prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> list[Rollout]:
    """Neighbours with the same prompt together, which is then computed once."""
    pairs = zip((tuple(ids) for ids in prompt_ids), completion_ids, strict=True)
    return [
        Rollout(Prompt(prompt, ""), tuple(_completion(tuple(ids)) for _, ids in group))
        for prompt, group in itertools.groupby(pairs, key=lambda pair: pair[0])
    ]


def _completion(ids: tuple[int, ...]) -> Completion:
    return Completion(ids, "", (0.0,) * len(ids), None, "stop", (0,) * len(ids))


def _difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """In what two tokenizers differ; the padding token aside, which no sequence holds."""
    first, second = one.get_vocab(), other.get_vocab()
    if first != second:
        token = min(token for token, index in (first.items() ^ second.items()))
        return f"{token!r} is {first.get(token, 'no token')} to one and {second.get(token, 'no token')} to the other"
    if one.eos_token_id != other.eos_token_id:
        return f"texts end with {one.eos_token!r} or {other.eos_token!r}"
    if (one.chat_template is None) != (other.chat_template is None):
        return "one has a chat template, and the other has none"
    if _rendered(one) != _rendered(other):
        return "they make other ids of the same conversation"
    return None


def _rendered(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a short conversation."""
    if tokenizer.chat_template is None:
        return list(tokenizer(_CONVERSATION[1]["content"])["input_ids"])
    return list(tokenizer(render_template(tokenizer, _CONVERSATION), add_special_tokens=False)["input_ids"])

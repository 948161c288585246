"""A reward model as a reward function; it shares the policy's frozen base if it was trained on the same base.

The model scores exactly the sampled token ids of prompt and completion. A truncated completion has no end token, and is
scored without one.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from alignlab.data.packing import pack_rollouts
from alignlab.data.vocabulary import check_ids
from alignlab.errors import ConfigError
from alignlab.files.digests import digest_of_values
from alignlab.files.home_folder import with_home
from alignlab.models.adapters import is_of_adapter
from alignlab.models.decoder import num_embeddings, num_positions
from alignlab.models.fingerprints import model_digest, model_settings, weights_fingerprint
from alignlab.models.hub.checkpoints import load_tokenizer
from alignlab.models.hub.reward_checkpoints import is_reward_model, known_base, load_reward_model, load_reward_role
from alignlab.models.hub.template_limits import render_template
from alignlab.models.reward_model import RewardModel
from alignlab.models.weight_view import whole_parameters
from alignlab.scoring.calls import InlineReward
from alignlab.types import Completion, Prompt, Rollout

if TYPE_CHECKING:
    from alignlab.scoring.loading import LoadedReward

logger = logging.getLogger(__name__)

ROLE = "reward"
_CONVERSATION = [{"role": "user", "content": "What is 7 + 5?"}, {"role": "assistant", "content": " It's 12.\n"}]


class ModelReward(InlineReward):
    """A reward model's reward of each completion; the plug-in `reward_model`.

    A trainer binds the reward to its policy. An unbound one loads the model at the first call, and does not compare
    tokenizers.

    Args:
        model: a local folder: the output of trainer type reward, a `...ForSequenceClassification` of one label, or a
            PEFT adapter for one.
        tokens_per_microbatch: tokens in one forward pass; changes memory and speed, never a reward.

    Raises:
        ConfigError: the folder holds no reward model, or an option is out of range.
    """

    def __init__(self, model: str, tokens_per_microbatch: int = 4096) -> None:
        model = str(with_home(model)) if isinstance(model, str) else model
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

    def bind(self, policy: nn.Module, tokenizer: PreTrainedTokenizerBase, *, share: bool, role: str = ROLE) -> None:
        """Load the reward model: onto the policy's base, if that is identical byte for byte, or else beside the policy.

        Args:
            policy: the model in training.
            tokenizer: the policy's.
            share: whether the policy's adapter may be switched off during scoring; not if another thread scores.
            role: name of the reward model's adapter on the policy's base.

        Raises:
            ConfigError: the tokenizers differ.
        """
        self.check_tokenizer(tokenizer)
        base = known_base(self.path)
        if share and base is not None and isinstance(policy, PeftModel) and base == model_digest(policy):
            self._reward = load_reward_role(policy, self.path, role)
            return
        why = "it is not known to be trained on the policy's frozen base" if share else "rollouts are made ahead"
        logger.info("the reward model %s is loaded beside the policy: %s", self.path, why)
        self._reward = load_reward_model(self.path, device=next(policy.parameters()).device)

    @property
    def module(self) -> nn.Module | None:
        """The bound reward model; None before it is bound."""
        return self._reward

    @property
    def num_rows(self) -> int:
        """Rows of the bound reward model's embedding table."""
        assert self._reward is not None
        return num_embeddings(self._reward.model)

    def fingerprint(self) -> str:
        """Return a fingerprint of the bound reward model's own weights, the same on the policy's base and beside it."""
        reward = self._reward
        assert reward is not None
        if not isinstance(reward.model, PeftModel):
            return digest_of_values([weights_fingerprint(whole_parameters(reward)), model_settings(reward.model)])
        part = f".{reward.role or reward.model.active_adapter}."
        return weights_fingerprint(
            (name.replace(part, "."), weight)
            for name, weight in sorted(whole_parameters(reward))
            if part in name or name.startswith("score.")
        )

    def base_fingerprint(self) -> str | None:
        """Of the base under the reward model's adapter and of its config, the same wherever it is held; None where the
        reward model is no adapter. It is bound."""
        reward = self._reward
        assert reward is not None
        model = reward.model
        if not isinstance(model, PeftModel):
            return None
        weights = (
            (name.removeprefix("base_model.model.").replace(".base_layer.", "."), weight)
            for name, weight in model.named_parameters()
            if not is_of_adapter(model, name)
        )
        return digest_of_values([weights_fingerprint(sorted(weights, key=itemgetter(0))), model_settings(model)])

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise if token ids mean different things to the policy and to the reward model.

        Raises:
            ConfigError: the tokenizers differ.
        """
        reward_tokenizer = load_tokenizer(self.path)
        difference = _difference(reward_tokenizer, tokenizer)
        if difference is not None:
            raise ConfigError(
                f"the reward model {self.path} scores the policy's token ids, and its tokenizer "
                f"({reward_tokenizer.name_or_path}) is not the policy's ({tokenizer.name_or_path}): {difference}; "
                "train the reward model on the policy's base and tokenizer"
            )

    def __call__(
        self, *, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float | None]:
        """Return each completion's reward; None for one without a token, beyond the model's positions, or with a token
        that the model has no embedding for."""
        if self._reward is None:
            self._reward = load_reward_model(self.path, device="cuda" if torch.cuda.is_available() else "cpu")
        limit = num_positions(self._reward.model)
        rows = num_embeddings(self._reward.model)
        fits = [
            len(p) + len(c) <= limit and max((*p, *c), default=0) < rows
            for p, c in zip(prompt_ids, completion_ids, strict=True)
        ]
        scored_ids = [ids if fit else () for ids, fit in zip(completion_ids, fits, strict=True)]
        packs = pack_rollouts(_groups(prompt_ids, scored_ids), budget=self.budget)
        values = self._reward.rewards(packs, len(scored_ids)).tolist()
        return [value if ids else None for value, ids in zip(values, scored_ids, strict=True)]


def bind_rewards(
    rewards: Sequence[LoadedReward], policy: nn.Module, tokenizer: PreTrainedTokenizerBase, *, share: bool
) -> None:
    """Bind the reward models among the rewards, each with its own role; see `ModelReward.bind`."""
    models = [reward.function for reward in rewards if isinstance(reward.function, ModelReward)]
    for number, model in enumerate(models):
        model.bind(policy, tokenizer, share=share, role=f"{ROLE}_{number}" if number else ROLE)


def check_reward_ids(
    rewards: Sequence[LoadedReward], prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise if a bound reward model among the rewards has no embedding for a token of a prompt.

    Raises:
        ConfigError: the message has the prompt's number and the token.
    """
    for reward in rewards:
        if isinstance(reward.function, ModelReward):
            rows = {f"the reward model {reward.function.path}": reward.function.num_rows}
            check_ids(((prompt.token_ids,) for prompt in prompts), rows, tokenizer, what="prompt")


def fingerprints_of(rewards: Sequence[LoadedReward]) -> dict[str, str]:
    """Return the fingerprints of the bound reward models among the rewards, by name; see `TrainingLoop.frozen`."""
    models = [reward.function for reward in rewards if isinstance(reward.function, ModelReward)]
    fingerprints = {}
    for number, model in enumerate(models, start=1):
        fingerprints[f"reward model {number}"] = model.fingerprint()
        base = model.base_fingerprint()
        if base is not None:
            fingerprints[f"base of the reward model {number}"] = base
    return fingerprints


def modules_of(rewards: Sequence[LoadedReward]) -> list[nn.Module]:
    """Return the bound reward models among the rewards; of one on the policy's base, the policy is a part."""
    functions = [reward.function for reward in rewards]
    return [f.module for f in functions if isinstance(f, ModelReward) and f.module is not None]


def _groups(prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> list[Rollout]:
    """Return completions grouped by consecutive equal prompts; a group's prompt is computed once."""
    pairs = zip((tuple(ids) for ids in prompt_ids), completion_ids, strict=True)
    return [
        Rollout(Prompt(prompt, ""), tuple(Completion.of(ids) for _, ids in group))
        for prompt, group in itertools.groupby(pairs, key=lambda pair: pair[0])
    ]


def _difference(left: PreTrainedTokenizerBase, right: PreTrainedTokenizerBase) -> str | None:
    """Return how two tokenizers differ, the padding token aside, which no sequence holds; None if they do not."""
    first, second = left.get_vocab(), right.get_vocab()
    if first != second:
        token = min(token for token, index in (first.items() ^ second.items()))
        return f"{token!r} is {first.get(token, 'no token')} to one and {second.get(token, 'no token')} to the other"
    if left.eos_token_id != right.eos_token_id:
        return f"texts end with {left.eos_token!r} or {right.eos_token!r}"
    if (left.chat_template is None) != (right.chat_template is None):
        return "one has a chat template, and the other has none"
    if _rendered(left) != _rendered(right):
        return "they make other ids of the same conversation"
    return None


def _rendered(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of a short conversation."""
    if tokenizer.chat_template is None:
        return list(tokenizer(_CONVERSATION[1]["content"])["input_ids"])
    return list(tokenizer(render_template(tokenizer, _CONVERSATION), add_special_tokens=False)["input_ids"])

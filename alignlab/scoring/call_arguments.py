"""Arguments of a reward function's call: one entry a completion, in TRL's format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from alignlab.scoring.calls import RewardFailure, private_copy
from alignlab.scoring.columns import RESERVED, missing_column
from alignlab.scoring.loading import LoadedReward
from alignlab.scoring.plugins import accepted_arguments, parameters, required
from alignlab.types import Completion, Message, Prompt, Rollout, Text


@dataclass(frozen=True)
class CallBatch:
    """All completions of one scoring; every list has one entry a completion.

    Attributes:
        prompts: the prompts' texts or conversations.
        completions: a string after a string, a list of one assistant message after a conversation.
        prompt_ids, completion_ids: token ids.
        columns: by name, the dataset's columns; None for a row that lacks the column.
    """

    prompts: list[Text]
    completions: list[str | list[Message]]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], columns: Sequence[str]) -> CallBatch:
        """Return the completions of rollouts, end to end.

        Args:
            rollouts: prompts with their completions.
            columns: names of columns to include even where no prompt has them.
        """
        pairs = [(rollout.prompt, completion) for rollout in rollouts for completion in rollout.completions]
        return cls(
            prompts=[prompt.text for prompt, _ in pairs],
            completions=[_in_prompt_format(prompt.text, completion.text) for prompt, completion in pairs],
            prompt_ids=[list(prompt.token_ids) for prompt, _ in pairs],
            completion_ids=[list(completion.token_ids) for _, completion in pairs],
            columns={name: [prompt.columns.get(name) for prompt, _ in pairs] for name in _names(pairs, columns)},
        )

    def __len__(self) -> int:
        return len(self.prompts)

    def arguments(self, reward: LoadedReward) -> dict[str, Any]:
        """Return the keyword arguments for a reward: those that its signature accepts, its options before columns.

        Every call gets copies, so that no reward sees what another one has written into its arguments.

        Raises:
            RewardFailure: neither the dataset nor the options have an argument that the reward requires.
        """
        available: dict[str, Any] = self.columns | {"prompts": self.prompts, "completions": self.completions}
        available |= {"completion_ids": self.completion_ids, **reward.options}
        signature = parameters(reward.function)
        if signature is not None and "prompt_ids" in signature:  # TRL has no such argument: only by name
            available["prompt_ids"] = self.prompt_ids
        missing = [name for name in required(signature or {}) if name not in available]
        if missing:
            message = missing_column(reward.name, missing[0], list(self.columns), "the dataset")
            raise RewardFailure("missing column", message)
        return {
            name: private_copy(value) if name in reward.options else [private_copy(entry) for entry in value]
            for name, value in accepted_arguments(signature, available).items()
        }


def _names(pairs: Sequence[tuple[Prompt, Completion]], columns: Sequence[str]) -> Iterator[str]:
    """Yield the names of the columns, each once, in order of appearance."""
    in_prompts = (name for prompt, _ in pairs for name in prompt.columns if name not in RESERVED)
    yield from dict.fromkeys([*in_prompts, *columns])


def _in_prompt_format(prompt: Text, completion: str) -> str | list[Message]:
    return completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]



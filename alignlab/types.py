"""The types that every part shares: prompts, rollouts, segments, experience.

Shapes: N tokens of one pack, S segments, B sequences of an optimizer step, L MoE layers, K experts a token.
Every [N] tensor is indexed by the token it describes: `logprobs[t] = log p(tokens[t] | what precedes it)`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Message = Mapping[str, Any]
Text = str | Sequence[Message]
FinishReason = Literal["stop", "length", "aborted"]


def message_text(text: Text) -> str:
    """The plain text of a prompt or completion: of a chat, the content of its last message."""
    if isinstance(text, str):
        return text
    return str(text[-1].get("content") or "") if text else ""


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready to generate from.

    Attributes:
        token_ids: what the engine is fed, after the chat template.
        text: the prompt as the dataset gave it, a string or a list of chat messages; rewards receive this.
        index: row in its dataset.
        columns: the row's other columns; rewards receive them by name.
    """

    token_ids: tuple[int, ...]
    text: Text
    index: int = 0
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SamplingParams:
    """How completions are sampled.

    Attributes:
        n: completions a prompt, >= 1.
        temperature: >= 0; 0 is greedy.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with at least this probability, in (0, 1].
        min_p: drop tokens less likely than this fraction of the likeliest, in [0, 1).
        repetition_penalty: > 0; divides positive and multiplies negative logits of tokens seen before; 1 is off.
        max_new_tokens: limit of a completion's length, >= 1.
        min_new_tokens: stop tokens and the end of sequence cannot be sampled before this many tokens.
        stop: strings that end a completion; the text is cut before them, the tokens are kept.
        stop_token_ids: tokens that end a completion, beside the model's own end tokens.
        ignore_eos: go on to `max_new_tokens` whatever the model samples.
        seed: None draws one from torch's global generator; the same seed gives the same completions,
            whatever else is in the batch.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 64
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prompt.

    Attributes:
        token_ids: exactly the ids that were sampled, the end token included.
        text: decoded, without special tokens, cut before a stop string.
        logprobs: of each token under the distribution sampled from (temperature, truncation), nats.
        raw_logprobs: of each token under the model's own distribution, nats; None where the engine does not know them.
        finish_reason: "stop" (end token, stop token or stop string), "length" or "aborted".
        policy_versions: version of the weights that sampled each token.
        routing: [prompt + completion tokens, L, K] int16, experts chosen, -1 where there is no record; None if dense.
        own: of each token, whether the policy wrote it and not, say, a tool; None where the policy wrote all.
    """

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    raw_logprobs: tuple[float, ...] | None
    finish_reason: FinishReason
    policy_versions: tuple[int, ...]
    routing: Tensor | None = None
    own: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class Rollout:
    """A prompt with its group of G completions and, once scored, their rewards.

    Attributes:
        rewards: total reward of each completion; nan where no reward function gave one.
        reward_parts: by reward function, its raw value for each completion; None where it does not apply or failed.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards: tuple[float, ...] = ()
    reward_parts: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Segments:
    """How N flat tokens divide into sequences, and which completions hang on which shared prompt.

    A segment is a contiguous run of tokens. A *root* (prefix -1) attends causally to itself; a segment with a prefix
    attends to all of the prefix's tokens and causally to itself, and its positions go on from the prefix's. Prefixes
    are roots: sharing is one level deep, and a prefix comes before the segments that hang on it.

    Attributes, one entry a segment:
        lengths: tokens in the segment, >= 1.
        prefixes: index of the segment that this one continues, or -1.
        sequence_ids: which sequence of the optimizer step the segment ends, 0..B-1; -1 for a shared prompt.
        group_ids: which prompt's group it belongs to.
    """

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]
    sequence_ids: tuple[int, ...]
    group_ids: tuple[int, ...]
    device: torch.device = torch.device("cpu")

    def __post_init__(self) -> None:
        count = len(self.lengths)
        assert len(self.prefixes) == len(self.sequence_ids) == len(self.group_ids) == count
        assert all(length >= 1 for length in self.lengths), "a segment holds at least one token"
        assert all(p == -1 or (p < i and self.prefixes[p] == -1) for i, p in enumerate(self.prefixes))

    @classmethod
    def single(cls, length: int, device: torch.device | None = None) -> Segments:
        """One sequence of `length` tokens."""
        return cls((length,), (-1,), (0,), (0,), device or torch.device("cpu"))

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First token of each segment."""
        offsets = [0]
        for length in self.lengths[:-1]:
            offsets.append(offsets[-1] + length)
        return tuple(offsets[: len(self.lengths)])

    @cached_property
    def segment_of_token(self) -> Int[Tensor, "N"]:
        """Index of each token's segment."""
        lengths = torch.tensor(self.lengths, device=self.device)
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=self.device), lengths)

    @cached_property
    def position_ids(self) -> Int[Tensor, "N"]:
        """Position of each token in its sequence, the shared prompt counted."""
        parts = [
            torch.arange(length) + (self.lengths[prefix] if prefix >= 0 else 0)
            for length, prefix in zip(self.lengths, self.prefixes, strict=True)
        ]
        return torch.cat(parts).to(self.device)

    @cached_property
    def predecessors(self) -> Int[Tensor, "N"]:
        """Index of the token whose hidden state predicts each token; -1 for the first token of a root."""
        index = torch.arange(self.num_tokens) - 1
        for start, prefix in zip(self.starts, self.prefixes, strict=True):
            index[start] = self.starts[prefix] + self.lengths[prefix] - 1 if prefix >= 0 else -1
        return index.to(self.device)

    @cached_property
    def sequence_of_token(self) -> Int[Tensor, "N"]:
        """Sequence id of each token; -1 on a shared prompt."""
        return torch.tensor(self.sequence_ids, device=self.device)[self.segment_of_token]

    def to(self, device: torch.device | str) -> Segments:
        """The same table with its tensors on `device`."""
        device = torch.device(device)
        return self if device == self.device else replace(self, device=device)


@dataclass(frozen=True)
class Experience:
    """One pack of tokens with all that is known of them: what a loss is computed from.

    Attributes:
        tokens: ids.
        segments: how the tokens divide into sequences.
        completion_mask: True exactly on tokens that the policy sampled (or that SFT teaches) and that we train on.
        rollout_logprobs: as the engine reported them; 0 off the mask.
        old_logprobs: under the trainer's weights before the update.
        ref_logprobs: under the reference.
        advantages: of each token; 0 off the mask.
        values: of the state in which each token was chosen, by the critic before the update.
        returns: what the values should be.
        routing: experts that the rollout chose, to be replayed; -1 where there is no record.
        margins: by which the chosen completion of the token's pair is to lead.
        probabilities: that the chosen completion of the token's pair is the better one.
    """

    tokens: Int[Tensor, "N"]
    segments: Segments
    completion_mask: Bool[Tensor, "N"]
    rollout_logprobs: Float[Tensor, "N"] | None = None
    old_logprobs: Float[Tensor, "N"] | None = None
    ref_logprobs: Float[Tensor, "N"] | None = None
    advantages: Float[Tensor, "N"] | None = None
    values: Float[Tensor, "N"] | None = None
    returns: Float[Tensor, "N"] | None = None
    routing: Int[Tensor, "N L K"] | None = None
    margins: Float[Tensor, "N"] | None = None
    probabilities: Float[Tensor, "N"] | None = None

    @property
    def num_tokens(self) -> int:
        return self.tokens.shape[0]

    def to(self, device: torch.device | str) -> Experience:
        """The same pack on `device`."""
        held: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in held.items() if value is not None})


@runtime_checkable
class RolloutEngine(Protocol):
    """What generates completions. `policy_version` is that of the weights in use."""

    policy_version: int

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """`sampling.n` completions of each prompt, in the order of `prompts`.

        Raises:
            RolloutError: a prompt leaves no room for a completion, or a parameter is out of range.
        """
        ...

    def update_weights(self, policy_version: int) -> None:
        """Take over the policy's present weights under a new version; drops what was cached under the old one."""
        ...

    def metrics(self) -> dict[str, float]:
        """What there is to see of its work so far, by name."""
        ...


class RewardFunction(Protocol):
    """A reward plug-in, with TRL's signature. `columns` holds the dataset's columns and `completion_ids`, as lists;
    and `prompt_ids` for one that names it."""

    def __call__(
        self, *, prompts: list[Any], completions: list[Any], **columns: Any
    ) -> list[float | None] | Awaitable[list[float | None]]:
        """One value a completion, in order; None where the reward does not apply to that sample."""
        ...

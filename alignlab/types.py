"""Types that all parts share: prompts, completions, rollouts, segments, experience.

Shapes: N tokens of one pack, S segments, B sequences and P pairs of an optimizer step, L MoE layers, K experts a token.
Every [N] tensor is indexed by the token it describes: `logprobs[t] = log p(tokens[t] | what precedes it)`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from alignlab.masked_tokens import MaskedTokens, remember
from alignlab.transfer import to_device

Message = Mapping[str, Any]
Text = str | Sequence[Message]
FinishReason = Literal["stop", "length", "aborted"]
Writer = Literal["policy", "tool", "user"]
TokenSequences = tuple[tuple[int, ...], ...]


def message_text(text: Text) -> str:
    """Return the plain text of a prompt or completion; for a chat, the content of its last message."""
    if isinstance(text, str):
        return text
    return str(text[-1].get("content") or "") if text else ""


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready to generate from.

    Attributes:
        token_ids: the engine's input, after the chat template.
        text: the prompt of the dataset, a string or a list of chat messages; rewards receive it.
        index: index of its row in the dataset.
        columns: the other columns of the row; rewards receive them by name.
    """

    token_ids: tuple[int, ...]
    text: Text
    index: int = 0
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sequences(self) -> TokenSequences:
        """The prompt's token ids as the only sequence of an item of a dataset."""
        return (self.token_ids,)

    @property
    def labels(self) -> tuple[float, ...]:
        """No numbers: training uses a prompt's tokens alone."""
        return ()


@dataclass(frozen=True)
class SamplingParams:
    """Parameters by which completions are sampled.

    Attributes:
        n: number of completions of each prompt, >= 1.
        temperature: >= 0; 0 is greedy.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with at least this probability, in (0, 1].
        min_p: drop tokens less likely than this fraction of the likeliest, in [0, 1).
        typical_p: keep the tokens whose surprise is nearest to the entropy, with at least this probability, in (0, 1];
            of what the others left.
        repetition_penalty: > 0; divides positive and multiplies negative logits of tokens seen before; 1 is off.
        presence_penalty: taken off the logits of the completion's tokens so far, once each; 0 is off.
        frequency_penalty: taken off the logits of the completion's tokens so far, as often as they came; 0 is off.
        logit_bias: (token id, number that is added to its logit), before all else.
        banned_token_ids: tokens that are never sampled.
        banned_words: texts whose tokens, with and without a space before, are never completed. The same text by other
            tokens may still be written.
        forced_tokens: (number of a token of the completion from 0 on, the token id that it must be).
        regex: pattern that the whole completion must match, up to its end token; needs the extra `structured`.
        json_schema: JSON schema, as JSON, that the whole completion must fit; needs the extra `structured`.
        max_new_tokens: largest number of tokens of a completion, >= 1.
        min_new_tokens: stop tokens and the end of sequence cannot be sampled before this many tokens.
        stop: strings that end a completion; the text is cut before them, the tokens are kept.
        stop_token_ids: tokens that end a completion, in addition to the model's end tokens.
        ignore_eos: continue to `max_new_tokens` even after an end token.
        seed: the same seed gives the same completions, whatever else is in the batch (on a GPU, but for logits that a
            batch of another size rounds differently); None draws a seed from torch's global generator.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    banned_token_ids: tuple[int, ...] = ()
    banned_words: tuple[str, ...] = ()
    forced_tokens: tuple[tuple[int, int], ...] = ()
    regex: str | None = None
    json_schema: str | None = None
    max_new_tokens: int = 64
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None


@dataclass(frozen=True)
class Completion:
    """One continuation of a prompt: sampled from the policy, or taken from a dataset.

    Attributes:
        token_ids: exactly the sampled ids, with the end token.
        text: decoded, without special tokens, cut before a stop string.
        logprobs: of each token under the distribution sampled from (temperature, truncation), nats; 0 for a token that
            the policy did not write.
        raw_logprobs: of each token under the model's own distribution, nats; None if the engine does not report them.
        finish_reason: "stop" (end token, stop token or stop string), "length" or "aborted".
        policy_versions: version of the weights that sampled each token.
        routing: [prompt + completion tokens, L, K] int16, the chosen experts, -1 without a record; None for a dense
            model.
        kv_record: [prompt + completion tokens, L, bytes] uint8, how a cache that approximates has rounded keys and
            values (`alignlab.models.kv_approximation.record`); None where nothing is to be replayed.
        writers: who wrote each token: the policy, a tool, or the user ("user" includes the text that a chat template
            puts between turns); None if the policy wrote all. Only the policy's tokens are trained on.
    """

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    raw_logprobs: tuple[float, ...] | None
    finish_reason: FinishReason
    policy_versions: tuple[int, ...]
    routing: Tensor | None = None
    kv_record: Tensor | None = None
    writers: tuple[Writer, ...] | None = None

    def __post_init__(self) -> None:
        assert self.writers is None or len(self.writers) == len(self.token_ids), "each token has one writer"

    @classmethod
    def of(
        cls, token_ids: Sequence[int], text: str = "", *, logprobs: Sequence[float] | None = None,
        raw_logprobs: Sequence[float] | None = None, finish_reason: FinishReason = "stop", policy_version: int = 0,
        writers: Sequence[Writer] | None = None,
    ) -> Completion:
        """Return a completion that no engine sampled; all its tokens have one policy version.

        Args:
            logprobs: log-prob of each token; default: 0.
        """
        return cls(
            token_ids=tuple(token_ids),
            text=text,
            logprobs=(0.0,) * len(token_ids) if logprobs is None else tuple(logprobs),
            raw_logprobs=None if raw_logprobs is None else tuple(raw_logprobs),
            finish_reason=finish_reason,
            policy_versions=(policy_version,) * len(token_ids),
            writers=None if writers is None else tuple(writers),
        )

    @property
    def policy_tokens(self) -> tuple[bool, ...]:
        """Mask of the tokens that the policy wrote."""
        if self.writers is None:
            return (True,) * len(self.token_ids)
        return tuple(writer == "policy" for writer in self.writers)


@dataclass(frozen=True)
class Rollout:
    """A prompt with its group of G completions and, once scored, their rewards.

    Attributes:
        rewards: total reward of each completion; nan if no reward function returned a value.
        reward_parts: raw value of each completion by reward function; None if it does not apply or failed.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards: tuple[float, ...] = ()
    reward_parts: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Segments:
    """Division of N flat tokens into sequences, in which completions may share a prompt.

    A segment is a contiguous run of tokens. A *root* (prefix -1) attends causally to itself; a segment with a prefix
    attends to all tokens of the prefix and causally to itself, and its positions continue those of the prefix. Prefixes
    are roots: sharing is one level deep, and a prefix comes before the segments that continue it.

    Attributes, one entry a segment:
        lengths: number of tokens, >= 1.
        prefixes: index of the segment that this one continues, or -1.
        sequence_ids: index, 0..B-1, of the sequence of the optimizer step that ends with the segment; -1 for a shared
            prompt.
        group_ids: index of its prompt's group.
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
        """Return the segments of one sequence of `length` tokens."""
        return cls((length,), (-1,), (0,), (0,), device or torch.device("cpu"))

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Index of the first token of each segment."""
        offsets = [0]
        for length in self.lengths[:-1]:
            offsets.append(offsets[-1] + length)
        return tuple(offsets[: len(self.lengths)])

    @cached_property
    def segment_of_token(self) -> Int[Tensor, "N"]:
        """Index of each token's segment."""
        index = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))
        return index.to(self.device)

    @cached_property
    def position_ids(self) -> Int[Tensor, "N"]:
        """Position of each token in its sequence, from the start of the shared prompt."""
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
        ids = torch.repeat_interleave(torch.tensor(self.sequence_ids), torch.tensor(self.lengths))
        return ids.to(self.device)

    @cached_property
    def sequences(self) -> tuple[int, ...]:
        """Ids of the sequences that end here, ascending."""
        return tuple(sorted({i for i in self.sequence_ids if i >= 0}))

    @cached_property
    def pairs(self) -> tuple[int, ...]:
        """Ids of the pairs here, ascending, where sequences 2 i and 2 i + 1 are the chosen and rejected of pair i."""
        return tuple(sorted({i // 2 for i in self.sequences}))

    @property
    def per_token(self) -> dict[str, Tensor]:
        """The tensors [N] above, by name."""
        return {name: getattr(self, name) for name in _PER_TOKEN}

    @property
    def on_host(self) -> Segments:
        """The same segments with their tensors on the CPU, which are made there: no device is waited for."""
        return self if self.device.type == "cpu" else replace(self, device=torch.device("cpu"))

    def to(self, device: torch.device | str) -> Segments:
        """Return the same segments with their tensors on `device`."""
        device = torch.device(device)
        if device == self.device:
            return self
        return self.with_tensors(dict(zip(_PER_TOKEN, to_device(list(self.per_token.values()), device), strict=True)))

    def with_tensors(self, per_token: Mapping[str, Tensor]) -> Segments:
        """Return the same segments with the tensors of `per_token`, on their device."""
        moved = replace(self, device=per_token[_PER_TOKEN[0]].device)
        moved.__dict__.update(per_token)  # as if the properties had been asked
        return moved


_PER_TOKEN = ("segment_of_token", "position_ids", "predecessors", "sequence_of_token")


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
        kv_record: how the engine's cache rounded keys and values, to be replayed; see `Completion`.
        pair_margins: of each pair of the optimizer step, by which its chosen completion is to lead.
        pair_probabilities: of each pair of the step, that its chosen completion is the better one.
        desirable: of each sequence of the step, whether it is labelled good.
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
    kv_record: UInt8[Tensor, "N L bytes"] | None = None
    pair_margins: Float[Tensor, "P"] | None = None
    pair_probabilities: Float[Tensor, "P"] | None = None
    desirable: Bool[Tensor, "B"] | None = None

    @property
    def num_tokens(self) -> int:
        return self.tokens.shape[0]

    def to(self, device: torch.device | str) -> Experience:
        """Return the same pack on `device`, moved there by one copy."""
        device = torch.device(device)
        held = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        if self.segments.device == device and all(value.device == device for value in held.values()):
            return self
        parts: list[dict[str, Tensor]] = [held, self.segments.per_token, self._places(device)]
        tensors = iter(to_device([tensor for part in parts for tensor in part.values()], device))
        held, per_token, places = ({name: next(tensors) for name in part} for part in parts)
        segments = self.segments if self.segments.device == device else self.segments.with_tensors(per_token)
        moved = replace(self, segments=segments, **held)
        if places:
            remember(moved.completion_mask, MaskedTokens(**places))
        return moved

    def _places(self, device: torch.device) -> dict[str, Tensor]:
        """Return the places of the masked tokens, if they are found on the host for `device`, and can be predicted."""
        if self.completion_mask.device.type != "cpu" or device.type == "cpu":
            return {}
        indices = self.completion_mask.nonzero()[:, 0]
        predecessors = self.segments.predecessors[indices]
        return {} if bool((predecessors < 0).any()) else {"indices": indices, "predecessors": predecessors}


class RewardFunction(Protocol):
    """A reward plug-in, with TRL's signature.

    `columns` holds the columns of the dataset and `completion_ids`, as lists; also `prompt_ids` if the function has a
    parameter of that name.
    """

    def __call__(
        self, *, prompts: list[Any], completions: list[Any], **columns: Any
    ) -> list[float | None] | Awaitable[list[float | None]]:
        """Return one value for each completion, in order; None for completions to which the reward does not apply."""
        ...

"""Unpaired preferences: a prompt and a completion, which is good or bad by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

from transformers import PreTrainedTokenizerBase

from alignlab.config.data import DataSettings
from alignlab.config.render import RenderSettings
from alignlab.data.messages import BadRow, check_text, without_value
from alignlab.data.preferences import (
    Mask,
    completion_tokens,
    group_of,
    preference_from_row,
    preference_rows,
    read_rows,
)
from alignlab.data.prompts import chat_of, split_row
from alignlab.data.rendering import PromptRenderer
from alignlab.data.rows import as_label
from alignlab.data.sequences import Sequences
from alignlab.errors import DataError
from alignlab.types import Rollout, Text


@dataclass(frozen=True)
class UnpairedPreference:
    """Token ids of a prompt and of a completion, the end token included.

    Attributes:
        prompt: at least one token.
        completion: at least one token.
        desirable: whether it is a good one.
        mismatched: a completion of another prompt of the dataset, from which the KL to the reference is estimated.
        completion_mask, mismatched_mask: of each token, whether the assistant wrote it, and not a tool; None for all.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    desirable: bool
    mismatched: tuple[int, ...] = ()
    completion_mask: Mask = None
    mismatched_mask: Mask = None

    @property
    def num_tokens(self) -> int:
        return len(self.completion) + len(self.mismatched)

    @property
    def sequences(self) -> Sequences:
        """Its completion and the mismatched one behind the prompt."""
        return self.prompt + self.completion, self.prompt + self.mismatched

    @property
    def labels(self) -> tuple[float, ...]:
        """Whether it is a good one; and of a completion that the assistant did not write alone, the mask."""
        return float(self.desirable), *map(float, self.completion_mask or ())

    def as_group(self, logprobs: Sequence[float] | None = None) -> Rollout:
        """Its completion and the mismatched one as a group, to be packed; see `group_of`."""
        return group_of(
            self.prompt, (self.completion, self.mismatched), (self.completion_mask, self.mismatched_mask), logprobs
        )


@dataclass(frozen=True)
class UnpairedDataset(Sequence[UnpairedPreference]):
    """Unpaired preferences in the order of their rows.

    Attributes:
        preferences: those that can be used.
        skipped: rows left out, counted by reason: those of `PreferenceDataset`.
    """

    preferences: tuple[UnpairedPreference, ...]
    skipped: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.preferences)

    @overload
    def __getitem__(self, index: int) -> UnpairedPreference: ...
    @overload
    def __getitem__(self, index: slice) -> UnpairedDataset: ...
    def __getitem__(self, index: int | slice) -> UnpairedPreference | UnpairedDataset:
        if isinstance(index, slice):
            return UnpairedDataset(self.preferences[index], self.skipped)
        return self.preferences[index]


def load_unpaired(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> UnpairedDataset:
    """The unpaired preferences of the source that `settings` names; see `unpaired_from_rows`.

    Of a task, whose rows have an answer: the right answer is good, that of another question is bad.
    """
    return unpaired_from_rows(preference_rows(settings), settings, tokenizer)


def unpaired_from_rows(
    rows: Iterable[Mapping[str, Any]], settings: RenderSettings, tokenizer: PreTrainedTokenizerBase
) -> UnpairedDataset:
    """Render and tokenise rows of one of two forms, strings or chat messages (TRL's forms).

    - a prompt, `completion` and `label`, true or 1 where the completion is good, false or 0 where it is bad, also as
      text; `messages` are a prompt and, as their last one, the completion;
    - `chosen` and `rejected`, see `preferences_from_rows`: a good completion and a bad one.

    Raises:
        ConfigError: the settings contradict each other or the tokenizer.
        DataError: a row cannot be used (with its number), or no row can; all labels are the same; there is no
            completion of another prompt to mismatch one with.
    """
    found, skipped = read_rows(rows, settings, tokenizer, _from_row)
    return UnpairedDataset(mismatch(found, settings.source), skipped)


def _from_row(row: Mapping[str, Any], render: PromptRenderer) -> list[UnpairedPreference]:
    if row.get("completion") is None and {"chosen", "rejected"} & set(row):
        pair = preference_from_row(row, render)
        both = ((pair.chosen, True, pair.chosen_mask), (pair.rejected, False, pair.rejected_mask))
        return [UnpairedPreference(pair.prompt, ids, good, completion_mask=mask) for ids, good, mask in both]
    prompt, completion = _prompt_and_completion(row, render.settings.prompt_column)
    if row.get("label") is None:
        raise without_value(row, "label")
    label = as_label(row["label"], "label")
    start, ids, mask = completion_tokens(prompt, completion, render)
    return [UnpairedPreference(start, ids, label, completion_mask=mask)]


def _prompt_and_completion(row: Mapping[str, Any], prompt_column: str) -> tuple[Text, Text]:
    """Return what a row asks and what is labelled of it: the completion, or the last message of its `messages`."""
    if row.get("completion") is not None:
        return split_row(row, prompt_column)[0], check_text(row["completion"], "completion")
    if row.get(prompt_column) is not None or row.get("messages") is None:
        raise without_value(row, "completion")
    messages = chat_of(row["messages"])
    if messages[-1]["role"] != "assistant" or len(messages) == 1:
        raise BadRow(
            "missing_column",
            "has no column 'completion', and its 'messages' do not end with the assistant's, which the label would be "
            "of; add it to the messages, or as the column 'completion'",
        )
    return messages[:-1], messages[-1:]


def mismatch(preferences: Sequence[UnpairedPreference], source: str = "the data") -> tuple[UnpairedPreference, ...]:
    """Each with the completion of the next one that has another prompt and another completion.

    The good ones go before the bad ones, and round: so each completion, of a pair too, is taken about once, and those
    that the KL is estimated from are like those that are learnt from. It is cut where it would make a sequence longer
    than all that are learnt from.

    Raises:
        DataError: all labels are the same, or there is none for one of them.
    """
    labels = {each.desirable for each in preferences}
    if len(labels) == 1:
        kind = "true" if labels.pop() else "false"
        raise DataError(
            f"{source}: labels must be of both kinds, and all {len(preferences)} are {kind}; add completions of the "
            "other kind or, to learn from good ones alone, use supervised fine-tuning"
        )
    places = sorted(range(len(preferences)), key=lambda i: not preferences[i].desirable)
    ordered = [preferences[i] for i in places]
    found = dict(zip(places, _others(ordered), strict=True))
    longest = max(len(each.prompt) + len(each.completion) for each in preferences)
    return tuple(_with_mismatched(each, found[i], longest - len(each.prompt)) for i, each in enumerate(preferences))


def _with_mismatched(preference: UnpairedPreference, other: UnpairedPreference, room: int) -> UnpairedPreference:
    """The preference with the completion of another, cut to `room` tokens."""
    mask = None if other.completion_mask is None else other.completion_mask[:room]
    return replace(preference, mismatched=other.completion[:room], mismatched_mask=mask)


def _others(ordered: Sequence[UnpairedPreference]) -> list[UnpairedPreference]:
    """For each, the next one, round the end, that shares neither prompt nor completion with it."""
    count, around = len(ordered), [*ordered, *ordered]
    next_prompt = _next_changes([each.prompt for each in around])
    next_completion = _next_changes([each.completion for each in around])
    found = []
    for i, each in enumerate(ordered):
        j = i + 1
        while j < i + count:  # a run of equal prompts or completions is passed in one stride
            if around[j].prompt == each.prompt:
                j = next_prompt[j]
            elif around[j].completion == each.completion:
                j = next_completion[j]
            else:
                break
        if j >= i + count:
            raise DataError(
                "the KL to the reference is estimated from completions of other prompts, and for one of the rows there "
                "is none with another prompt and another completion; add rows with other prompts"
            )
        found.append(around[j])
    return found


def _next_changes(values: Sequence[Any]) -> list[int]:
    """For each place, the next one with another value; their number where there is none."""
    places = [len(values)] * len(values)
    for i in reversed(range(len(values) - 1)):
        places[i] = places[i + 1] if values[i] == values[i + 1] else i + 1
    return places

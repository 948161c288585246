"""Unpaired preferences: a prompt and a completion that is labelled good or bad."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignlab.config.data import DataSettings, RenderSettings
from alignlab.data.bad_row import BadRow, without_value
from alignlab.data.dataset import Dataset, dataset_from_rows
from alignlab.data.messages import check_text
from alignlab.data.preferences import (
    Mask,
    check_pair_settings,
    completion_tokens,
    group_of,
    preference_from_row,
    preference_rows,
)
from alignlab.data.prompts import chat_of, split_row
from alignlab.data.rendering import PromptRenderer
from alignlab.data.rows import as_label
from alignlab.errors import DataError
from alignlab.types import Rollout, Text, TokenSequences


@dataclass(frozen=True)
class UnpairedPreference:
    """Token ids of a prompt and of a completion, the end token included.

    Attributes:
        prompt: at least one token.
        completion: at least one token.
        desirable: True if the completion is labelled good.
        mismatched: a completion of another prompt of the dataset, from which the KL to the reference is estimated.
        completion_mask, mismatched_mask: True for each token that the assistant wrote, False for a tool's; None for
            all.
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
    def sequences(self) -> TokenSequences:
        """The prompt with the completion, and with the mismatched one."""
        return self.prompt + self.completion, self.prompt + self.mismatched

    @property
    def labels(self) -> tuple[float, ...]:
        """1 for a good completion, else 0; and the mask, if the assistant did not write all tokens."""
        return float(self.desirable), *map(float, self.completion_mask or ())

    def as_group(self, logprobs: Sequence[float] | None = None) -> Rollout:
        """Return the completion and the mismatched one as a group, to be packed; see `group_of`."""
        return group_of(
            self.prompt, (self.completion, self.mismatched), (self.completion_mask, self.mismatched_mask), logprobs
        )


def load_unpaired(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> Dataset[UnpairedPreference]:
    """Return the unpaired preferences of a source; see `unpaired_from_rows`.

    For a task, whose rows have an answer, the right answer is good and the answer of another question bad.
    """
    return unpaired_from_rows(preference_rows(settings), settings.rendering, tokenizer)


def unpaired_from_rows(
    rows: Iterable[Mapping[str, Any]], settings: RenderSettings, tokenizer: PreTrainedTokenizerBase
) -> Dataset[UnpairedPreference]:
    """Render and tokenise rows of one of two forms, strings or chat messages (TRL's forms).

    - a prompt, `completion` and `label`: true or 1 for a good completion, false or 0 for a bad one, also as text.
      Instead of prompt and completion, `messages` may end with the completion;
    - `chosen` and `rejected`, see `preferences_from_rows`: a good completion and a bad one.

    Raises:
        ConfigError: the settings contradict each other or the tokenizer.
        DataError: a row cannot be used (with its number), or no row can; all labels are equal; or a completion has no
            mismatched one, because no row has another prompt.
    """
    check_pair_settings(settings, tokenizer)
    dataset = dataset_from_rows(rows, settings, tokenizer, _from_row)
    return Dataset(mismatch(dataset, settings.source), dataset.skipped)


def _from_row(row: Mapping[str, Any], render: PromptRenderer) -> list[UnpairedPreference]:
    if row.get("completion") is None and {"chosen", "rejected"} & set(row):
        pair = preference_from_row(row, render)
        return [
            UnpairedPreference(pair.prompt, pair.chosen, True, completion_mask=pair.chosen_mask),
            UnpairedPreference(pair.prompt, pair.rejected, False, completion_mask=pair.rejected_mask),
        ]
    prompt, completion = _prompt_and_completion(row, render.settings.prompt_column)
    if row.get("label") is None:
        raise without_value(row, "label")
    label = as_label(row["label"], "label")
    start, ids, mask = completion_tokens(prompt, completion, render)
    return [UnpairedPreference(start, ids, label, completion_mask=mask)]


def _prompt_and_completion(row: Mapping[str, Any], prompt_column: str) -> tuple[Text, Text]:
    """Return the prompt of a row, and its labelled completion: a column, or the last of its `messages`."""
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
    """Return the preferences, each with the completion of the next one that has another prompt and completion.

    The preferences are in a circle, the good ones before the bad ones: so each completion, also of a pair, is used
    about once, and the KL is estimated from completions like those trained on. A mismatched completion is cut to make
    no sequence longer than the longest one trained on.

    Raises:
        DataError: all labels are equal, or a preference has no such next one.
    """
    labels = {preference.desirable for preference in preferences}
    if len(labels) == 1:
        kind = "true" if labels.pop() else "false"
        raise DataError(
            f"{source}: labels must be of both kinds, and all {len(preferences)} are {kind}; add completions of the "
            "other kind or, to learn from good ones alone, use supervised fine-tuning"
        )
    order = sorted(range(len(preferences)), key=lambda i: not preferences[i].desirable)
    sources = dict(zip(order, _next_different([preferences[i] for i in order]), strict=True))
    longest = max(len(preference.prompt) + len(preference.completion) for preference in preferences)
    return tuple(
        _with_mismatched(preference, sources[i], longest - len(preference.prompt))
        for i, preference in enumerate(preferences)
    )


def _with_mismatched(preference: UnpairedPreference, source: UnpairedPreference, room: int) -> UnpairedPreference:
    """Return the preference with the completion of `source`, cut to `room` tokens, as the mismatched one."""
    mask = None if source.completion_mask is None else source.completion_mask[:room]
    return replace(preference, mismatched=source.completion[:room], mismatched_mask=mask)


def _next_different(ordered: Sequence[UnpairedPreference]) -> list[UnpairedPreference]:
    """Return, for each, the next one in the circle that shares neither prompt nor completion with it."""
    count, circle = len(ordered), [*ordered, *ordered]
    next_prompt = _next_changes([preference.prompt for preference in circle])
    next_completion = _next_changes([preference.completion for preference in circle])
    different = []
    for i, preference in enumerate(ordered):
        j = i + 1
        while j < i + count:  # skips equal prompts or completions at once: their number may be large
            if circle[j].prompt == preference.prompt:
                j = next_prompt[j]
            elif circle[j].completion == preference.completion:
                j = next_completion[j]
            else:
                break
        if j >= i + count:
            raise DataError(
                "the KL to the reference is estimated from completions of other prompts, and for one of the rows there "
                "is none with another prompt and another completion; add rows with other prompts"
            )
        different.append(circle[j])
    return different


def _next_changes(values: Sequence[Any]) -> list[int]:
    """Return, for each index, the next index with another value; `len(values)` if there is none."""
    indices = [len(values)] * len(values)
    for i in reversed(range(len(values) - 1)):
        indices[i] = indices[i + 1] if values[i] == values[i + 1] else i + 1
    return indices

"""Preferences: a prompt, and two completions of which one is better."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar, overload

from transformers import PreTrainedTokenizerBase

from alignlab.config.data import DataSettings
from alignlab.config.render import RenderSettings
from alignlab.data.common_prompt import common_prompt
from alignlab.data.examples import completion_example
from alignlab.data.messages import BadRow, check_text, without_value
from alignlab.data.prompts import count_or_raise, report
from alignlab.data.rendering import PromptRenderer
from alignlab.data.rows import as_number, readable_rows
from alignlab.data.sequences import Sequences
from alignlab.data.sources import load_rows
from alignlab.errors import ConfigError
from alignlab.types import Completion, Prompt, Rollout, Text

T = TypeVar("T")


class CompletionGroup(Protocol):
    """A prompt and completions of it that a reference scores end to end."""

    @property
    def num_tokens(self) -> int:
        """Of all its completions."""
        ...

    def as_group(self, logprobs: Sequence[float] | None = None) -> Rollout:
        """As a group to be packed; see `group_of`."""
        ...


Mask = tuple[bool, ...] | None
"""Of each token of a completion, whether the assistant wrote it; None where it wrote all."""


def group_of(
    prompt: tuple[int, ...],
    completions: Sequence[tuple[int, ...]],
    masks: Sequence[Mask],
    logprobs: Sequence[float] | None = None,
) -> Rollout:
    """Completions of a prompt as a group, to be packed; `logprobs` of all of them, end to end, by default 0."""
    known = iter(itertools.repeat(0.0) if logprobs is None else logprobs)
    made = [
        Completion(ids, "", tuple(itertools.islice(known, len(ids))), None, "stop", (0,) * len(ids), own=mask)
        for ids, mask in zip(completions, masks, strict=True)
    ]
    return Rollout(Prompt(prompt, ""), tuple(made))


@dataclass(frozen=True)
class Preference:
    """Token ids of a prompt and of two completions, the end token included.

    Attributes:
        prompt: at least one token.
        chosen: the better completion, at least one token.
        rejected: the other.
        margin: how much better the chosen one is, >= 0, where that is known.
        probability: that the chosen one is the better one, in [0.5, 1], where a judge told that.
        chosen_mask, rejected_mask: of each token, whether the assistant wrote it, and not a tool; None for all.
    """

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    margin: float = 0.0
    probability: float = 1.0
    chosen_mask: Mask = None
    rejected_mask: Mask = None

    @property
    def num_tokens(self) -> int:
        return len(self.chosen) + len(self.rejected)

    @property
    def sequences(self) -> Sequences:
        """Both completions behind the prompt."""
        return self.prompt + self.chosen, self.prompt + self.rejected

    @property
    def labels(self) -> tuple[float, ...]:
        """Margin and probability; and of completions that the assistant did not write alone, the masks."""
        masks = (self.chosen_mask, self.rejected_mask)
        written = [mask or (True,) * len(ids) for mask, ids in zip(masks, (self.chosen, self.rejected), strict=True)]
        own = () if masks == (None, None) else (float(is_own) for mask in written for is_own in mask)
        return self.margin, self.probability, *own

    def as_group(self, logprobs: Sequence[float] | None = None) -> Rollout:
        """The pair as a group of two completions, to be packed; see `group_of`."""
        return group_of(
            self.prompt, (self.chosen, self.rejected), (self.chosen_mask, self.rejected_mask), logprobs
        )


@dataclass(frozen=True)
class PreferenceDataset(Sequence[Preference]):
    """Preferences in the order of their rows.

    Attributes:
        preferences: those that can be used.
        skipped: rows left out, counted by reason: missing_column, wrong_type, empty, too_long, unstable_template,
            identical, other_prompt, bad_margin, bad_probability, media, not_rendered.
    """

    preferences: tuple[Preference, ...]
    skipped: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.preferences)

    @overload
    def __getitem__(self, index: int) -> Preference: ...
    @overload
    def __getitem__(self, index: slice) -> PreferenceDataset: ...
    def __getitem__(self, index: int | slice) -> Preference | PreferenceDataset:
        if isinstance(index, slice):
            return PreferenceDataset(self.preferences[index], self.skipped)
        return self.preferences[index]


def load_preferences(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, *, margin_column: str | None = None,
    probability_column: str | None = None,
) -> PreferenceDataset:
    """The preferences of the source that `settings` names; see `preferences_from_rows`.

    Of a task, whose rows have an answer: the right answer is preferred to that of another question.
    """
    return preferences_from_rows(
        preference_rows(settings), settings, tokenizer, margin_column=margin_column,
        probability_column=probability_column,
    )


def preference_rows(settings: DataSettings) -> Iterable[Mapping[str, Any]]:
    """The rows of a source; of a task, with its right answers as chosen and others' as rejected."""
    rows = load_rows(settings)
    return rows if settings.task is None else right_and_wrong(rows)


def right_and_wrong(rows: Iterable[Mapping[str, Any]], *, num_wrong: int = 1) -> Iterator[dict[str, Any]]:
    """Each row's answer, against those of the next rows that have another: `num_wrong` different ones, if there are."""
    known = list(rows)
    answers = [str(row["answer"]) for row in known]
    for i, row in enumerate(known):
        others = dict.fromkeys(answer for answer in answers[i + 1 :] + answers[:i] if answer != answers[i])
        for wrong in itertools.islice(others, num_wrong) if others else (answers[i],):
            yield dict(row) | {"chosen": answers[i], "rejected": wrong}


def preferences_from_rows(
    rows: Iterable[Mapping[str, Any]], settings: RenderSettings, tokenizer: PreTrainedTokenizerBase,
    *, margin_column: str | None = None, probability_column: str | None = None,
) -> PreferenceDataset:
    """Render and tokenise rows with the columns `chosen` and `rejected`, strings or chat messages (TRL's forms).

    With a prompt column the two are completions of it; what others than the assistant say in them, such as tools, is
    read and not learnt. Without, both hold the prompt and the completion, and the prompt is what they have in common at
    their beginning. The end-of-sequence token closes each, once. `margin_column` holds how much better the chosen one
    is, `probability_column` how probably it is the better one.

    Raises:
        ConfigError: the settings contradict each other or the tokenizer.
        DataError: a row cannot be used (with its number), or no row can.
    """

    def read(row: Mapping[str, Any], render: PromptRenderer) -> list[Preference]:
        pair = preference_from_row(row, render)
        if margin_column is not None:
            pair = replace(pair, margin=_margin(row, margin_column))
        if probability_column is not None:
            pair = replace(pair, probability=_probability(row, probability_column))
        return [pair]

    found, skipped = read_rows(rows, settings, tokenizer, read)
    return PreferenceDataset(tuple(found), skipped)


def read_rows(
    rows: Iterable[Mapping[str, Any]],
    settings: RenderSettings,
    tokenizer: PreTrainedTokenizerBase,
    make: Callable[[Mapping[str, Any], PromptRenderer], Iterable[T]],
) -> tuple[list[T], Counter[str]]:
    """What `make` makes of each row, and how many rows were left out by reason.

    Raises:
        ConfigError, DataError: see `preferences_from_rows`.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("preferences end with the tokenizer's eos token, and it has none; set eos_token")
    if settings.taught_turns != "together":
        raise ConfigError(
            f"{settings.setting('taught_turns')} is {settings.taught_turns}, and is for supervised data alone; put the "
            "turns that are not compared into the prompt, and remove it"
        )
    render = PromptRenderer(settings, tokenizer)
    found: list[T] = []
    skipped: Counter[str] = Counter()
    for index, given in enumerate(readable_rows(rows, settings)):
        try:
            found += make(*render.read(given, index))
        except BadRow as error:
            count_or_raise(skipped, error, index, settings)
    report(len(found), skipped, settings)
    return found, skipped


def preference_from_row(row: Mapping[str, Any], render: PromptRenderer) -> Preference:
    """Of a row with `chosen` and `rejected`.

    Raises:
        BadRow: it cannot be used.
    """
    prompt, chosen, rejected = _columns(row, render)
    (start, good, good_mask), (other, bad, bad_mask) = (
        completion_tokens(prompt, text, render) for text in (chosen, rejected)
    )
    if start != other:
        raise BadRow("other_prompt", "is tokenised with another prompt before 'chosen' than before 'rejected'")
    if good == bad:
        raise BadRow("identical", "has the same completion in 'chosen' and 'rejected'")
    return Preference(start, good, bad, chosen_mask=good_mask, rejected_mask=bad_mask)


def _probability(row: Mapping[str, Any], column: str) -> float:
    value = _number(row, column)
    if not 0.5 <= value <= 1:
        raise BadRow(
            "bad_probability",
            f"has probability {value} in the column {column!r}, and it must be from 0.5, where nobody knows, to 1; "
            "below, the rejected completion is the chosen one",
        )
    return value


def _number(row: Mapping[str, Any], column: str) -> float:
    value = row.get(column)
    if value is None:
        raise without_value(row, column)
    return as_number(value, column)


def _margin(row: Mapping[str, Any], column: str) -> float:
    value = _number(row, column)
    if not 0 <= value < math.inf:
        raise BadRow("bad_margin", f"has margin {value} in the column {column!r}, and it must be finite and at least 0")
    return value


def _columns(row: Mapping[str, Any], render: PromptRenderer) -> tuple[Text, Text, Text]:
    """(prompt, chosen, rejected) of a row."""
    missing = [name for name in ("chosen", "rejected") if row.get(name) is None]
    if missing:
        raise without_value(row, missing[0])
    chosen, rejected = (check_text(row[name], name) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("wrong_type", "has a string in one of 'chosen' and 'rejected', and messages in the other")
    name = render.settings.prompt_column
    if row.get(name) is not None:
        return check_text(row[name], name), chosen, rejected
    if render.chat and isinstance(chosen, str):
        raise BadRow(
            "missing_column",
            f"has no column {name!r}, and where one speaker ends and the other begins in the texts of 'chosen' and "
            f"'rejected' is not known; give a prompt, chat messages, or {render.settings.setting('chat', False)}",
        )
    return common_prompt(chosen, rejected, render.special_texts)


def completion_tokens(
    prompt: Text, completion: Text, render: PromptRenderer
) -> tuple[tuple[int, ...], tuple[int, ...], Mask]:
    """Token ids of a prompt, and of a completion of it with its end token; and which of the latter are the assistant's.

    Raises:
        BadRow: they cannot be rendered.
    """
    example = completion_example(prompt, completion, render)
    first = example.completion_mask.index(True)
    mask = example.completion_mask[first:]
    return example.token_ids[:first], example.token_ids[first:], None if all(mask) else mask
